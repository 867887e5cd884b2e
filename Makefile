# One target for each thing a person does; `make help` lists them. Needs Python 3.11 to 3.13 and make.

PYTHON ?= python3
VENV := .venv
FLOORS := .venv-floors
EXTRA := dev
BIN := $(VENV)/bin
# Files or folders that `make test`, `test-quick` and `test-long` run; all if empty.
TESTS ?=
# Words of the names of faults in tests/mutants.toml that `make mutants` tries; all if empty.
MUTANTS ?=
# How many changes of the code `make mutants-random` draws, and from which seed.
N ?= 60
SEED ?= 1
INSTALLED := $(VENV)/.installed
# Several test files at a time, and all files that need Ray in one process (tests/suite.py). Slow
# tests wait for servers and for Ray, so three of them keep two cores busy.
# If a process crashes, the run ends and names the test; pytest-xdist may hang after a restart.
# The ten slowest tests are listed at the end.
PARALLEL := --dist loadgroup --no-loadscope-reorder --max-worker-restart 0 --durations 10
# What other people have set, which no test may notice (tests/clean_environment.py).
ELSEWHERE := MLFLOW_TRACKING_URI=http://127.0.0.1:9 MLFLOW_EXPERIMENT_NAME=theirs RAY_ADDRESS=127.0.0.1:9 \
	HF_HUB_OFFLINE=1 HF_TOKEN=theirs HF_ENDPOINT=http://127.0.0.1:9 HTTPS_PROXY=http://127.0.0.1:9 \
	IIET_WORKSPACE=/proc/theirs IIET_CPU_KERNELS=0 FORCE_COLOR=1 COLUMNS=40
# Without stored bytecode each of hundreds of processes would compile the packages anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-elsewhere test-long test-floors test-wheel mutants mutants-random wheel lint format modeling docs docs-links bench gpu ui clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Install, then run everything on a generated task (CPU, minutes)
	$(BIN)/iiet-orch quickstart

test: $(INSTALLED) ## Install, then run all tests but those of test-long and test-wheel
	$(BIN)/python -m pytest --numprocesses 3 $(PARALLEL) $(TESTS)

test-quick: $(INSTALLED) ## Run the tests that take seconds
	$(BIN)/python -m pytest --numprocesses 2 $(PARALLEL) -m "not slow" $(TESTS)

test-elsewhere: $(INSTALLED) ## Run the quick tests with the variables of somebody else, the last one first
	$(ELSEWHERE) $(BIN)/python -m pytest --reversed --numprocesses 2 $(PARALLEL) -m "not slow" $(TESTS)

test-long: $(INSTALLED) ## Run the longest checks: fuzzing, compilers, whole sweeps (up to an hour)
	IIET_LAW_EXAMPLES=20 $(BIN)/python -m pytest --numprocesses 2 $(PARALLEL) -m "(long or law) and not installs" $(TESTS)

test-wheel: $(INSTALLED) ## Install the wheel into empty environments, and run it there (gigabytes)
	$(BIN)/python -m pytest -m installs tests/behaviour/test_empty_environments.py

test-floors: ## Run the quick tests with the lowest versions that pyproject.toml allows
	mkdir -p $(FLOORS)
	$(PYTHON) tests/lowest_versions.py > $(FLOORS)/constraints.txt
	PIP_CONSTRAINT=$(abspath $(FLOORS))/constraints.txt $(MAKE) test-quick VENV=$(FLOORS) EXTRA=test

mutants: $(INSTALLED) ## Put known faults into a copy of the code, and check that tests notice
	$(BIN)/python tests/mutants.py $(MUTANTS)

mutants-random: $(INSTALLED) ## Change the code at N random places (SEED), and see what tests notice
	$(BIN)/python tests/random_mutants.py --number $(N) --seed $(SEED) $(TESTS)

wheel: $(INSTALLED) ## Build the wheel and the source archive into dist/
	$(BIN)/python -m hatchling build

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

modeling: $(INSTALLED) ## Make the models of transformers, iiet/hf/modeling_*.py, from their templates
	$(BIN)/python modeling/make_modeling.py

docs: $(INSTALLED) ## Build the documentation site in build/site; a broken link or reference fails
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/site

docs-links: $(INSTALLED) ## Check the links of the documentation to other sites (needs the network)
	$(BIN)/python -m sphinx --builder linkcheck docs build/links

bench: $(INSTALLED) ## Measure the ratios in research/benchmarks/README.md
	$(BIN)/python -m benchmarks

gpu: $(INSTALLED) ## Check and measure this machine's GPUs, and write gpu-report.md (under an hour)
	$(BIN)/python -m benchmarks --gpu

ui: $(INSTALLED) ## Browse the runs in MLflow
	$(BIN)/iiet-orch ui

clean: ## Remove environments, builds and caches; the workspace stays
	rm -rf $(VENV) $(FLOORS) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is renewed when the dependencies change, so that repeated runs start at once.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRA)]"
	touch $@

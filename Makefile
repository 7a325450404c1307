# make train        from nothing to a trained, evaluated and exported model; MODEL, EPOCHS, BATCH_SIZE, SEED, RUN, ARGS
# make test         lint and all tests
# make check        lint and the tests that are not slow: what to run between two thoughts
# make chaos        kills, full disks, two writers and damaged files at random: CHAOS_MINUTES (60), CHAOS_SEED
# make browser      Debian's Chromium, in which tests look at pages
# make bench        measure speed: the sections that bench/suite.json lacks; then docs/suite.md
# make docs         build the documentation in site/
# make notebooks    execute the notebooks in full and write them back
# make data         obtain and prepare MovieLens-100K
# make tensorboard  follow the runs
# make lint         ruff and mypy; `make format` mends what ruff can
# make setup        the virtual environment .venv; PYTHON=python3.12 chooses the interpreter, LOCK=1 the versions of requirements.lock
# make lock         requirements.lock anew: one version and its hashes of everything, for CPU and Python 3.11 to 3.13
# make audit        pip-audit: known vulnerabilities of what requirements.lock names, as `make test` does
# make clean        remove .venv
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)

LOCK ?=

MODEL ?= mvke
EPOCHS ?= 50
BATCH_SIZE ?= 256
SEED ?= 0
RUN ?= $(MODEL)-$(shell date +%Y%m%d-%H%M%S)
RUN := $(RUN)
ARGS ?=
CHAOS_MINUTES ?= 60

export TF_CPP_MIN_LOG_LEVEL ?= 2
export PYTHONUNBUFFERED = 1

.PHONY: help setup lock audit data train test check chaos lint format bench docs notebooks tensorboard browser clean
help:
	@sed -n '/^# make/s/^# //p' Makefile

setup: $(VENV)/.installed
$(VENV)/.installed: $(REQUIREMENTS) requirements-cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; install Python 3.11 to 3.13"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v}; try make PYTHON=python3.11")'
	@echo "Installing $(REQUIREMENTS) into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(if $(LOCK),$(PY) -m pip install --quiet --require-hashes -r requirements.lock)
	$(PY) -m pip install --quiet $(if $(LOCK),--no-deps --no-build-isolation -e .,-r $(REQUIREMENTS) -e '.[dev]')
	@touch $@

data: setup
	$(PY) scripts/preprocess_data.py

train: data
	$(if $(wildcard runs/$(RUN)/config.json),@echo "runs/$(RUN) is there: it goes on with the settings it was made with")
	$(PY) scripts/train.py $(if $(wildcard runs/$(RUN)/config.json),--resume runs/$(RUN),\
		--model $(MODEL) --epochs $(EPOCHS) --batch_size $(BATCH_SIZE) --seed $(SEED) --run_name $(RUN) $(ARGS))
	$(PY) scripts/export.py --checkpoint_path runs/$(RUN)
	$(PY) scripts/evaluate.py --model $(MODEL) --checkpoint_path runs/$(RUN)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lock: setup
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --extra dev pyproject.toml requirements-cpu.txt --output-file requirements.lock

audit: setup
	@VENV=$(VENV) .ci/audit

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# In the order of tests/conftest.py: the longest files first.
PYTEST := $(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: lint audit browser
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

chaos: setup
	$(PY) -m tests.chaos.campaign --minutes $(CHAOS_MINUTES) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

# The one thing that pip does not have. The test itself installs nothing and says what is missing.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| echo "warning: no chromium, and it could not be installed (as root: apt-get install chromium); its test will fail"

bench: data
	$(PY) benchmarks/suite.py
	$(PY) benchmarks/suite.py --page docs/suite.md

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo 'site/index.html   (with search: $(PY) -m http.server --directory site)'

notebooks: data
	$(PY) scripts/run_notebooks.py

tensorboard: setup
	$(VENV)/bin/tensorboard --logdir runs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

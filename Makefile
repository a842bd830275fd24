# `make demo` and `make test` work in a fresh clone: they set up .venv first, once.

# The first of these that is Python >= 3.11; or say it: make PYTHON=/path/to/python setup
PYTHON ?=
PYTHONS = $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# Options for `make demo`, `make test` and `make bench`, as in: make demo ARGS="--out runs/another"
ARGS ?=
TEST_WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.PHONY: help setup demo test test-lowest bench check format clean

help:  ## show the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(STAMP)  ## install LAVITA and the tools for working on it into .venv

demo: $(STAMP)  ## from arcade games to generated videos; writes runs/demo
	$(BIN)/lavita demo $(ARGS)

# One thread a worker: small tensors, and two workers already fill two cores.
test: $(STAMP)  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

test-lowest:  ## run every test on the lowest supported versions, in .venv-lowest (some GB of downloads)
	@test -x .venv-lowest/bin/python || $(or $(PYTHON),python3.11) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -r requirements-lowest.txt
	.venv-lowest/bin/python -m pip install -q --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal \
	  --ignore tests/test_wheel.py $(ARGS)

bench: $(STAMP)  ## measure speed, memory, scores and robustness; without ARGS, show the commands
	@$(BIN)/python -m benchmarks $(or $(ARGS),--help)

check: $(STAMP)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## format, and fix what can be fixed
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:  ## remove caches and build products (not .venv, not runs)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

SUPPORTED = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

$(STAMP): pyproject.toml requirements.lock
	@if [ ! -x $(BIN)/python ]; then \
	  found=; for python in $(PYTHONS); do \
	    if "$$python" -c "$(SUPPORTED)" 2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: LAVITA needs Python 3.11 or newer with its venv module; none among: $(PYTHONS)" >&2; exit 1; \
	  fi; \
	  "$$found" -m venv $(VENV); \
	fi
	@$(BIN)/python -c "$(SUPPORTED)" 2>/dev/null || \
	  { echo "error: $(VENV) does not hold Python 3.11 or newer; remove it and run make again" >&2; exit 1; }
	@echo "Installing into $(VENV) (some minutes, once) ..."
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --editable .
	@touch $@

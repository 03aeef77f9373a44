# Everything a fresh machine needs is python3 (3.11 or newer), pip and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help .venv demo test nightly check format bench performance tables clean

help: ## list the targets
	@grep -hE '^[.a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

.venv: $(STAMP) ## the environment of every other target, with the versions of constraints.txt

# A distribution may ship python3 without ensurepip; then the pip at hand installs one into the new environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tpcompile needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12" >&2; exit 3; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || \
	  { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test]'
	@touch $(STAMP)

demo: $(STAMP) ## the main job on a real model and real text: table, engines, report (under 5 minutes with installation)
	$(BIN)/tpcompile demo --force

test: check ## the gate: check, then every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(STAMP) ## 2,000 random masked transformers drawn anew: gathered equals masked (about an hour on two cores)
	TPCOMPILE_EXAMPLES=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/strangers/test_random.py

check: $(STAMP) ## lint and strict types
	$(BIN)/python tests/check.py

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(STAMP) ## measure what is missing of the default cells of docs/performance.md (hours, on a machine of your own)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed

performance: $(STAMP) ## docs/performance.md and README's table, from benchmarks/results/speed
	$(BIN)/python benchmarks/speed --page

tables: $(STAMP) ## docs/methods.md, coverage.md and tensorrt.md: what is not measured yet, through the compiler (half an hour each)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plans.py

clean: ## remove what the targets made, but not .venv
	rm -rf .typecheck .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist out demo-out

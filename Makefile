PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo report test mutants lint bench clean

help:  ## Show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED)  ## Create .venv and install requirements.lock into it (PYTHON=... picks the interpreter)

demo: $(INSTALLED)  ## Run the demo sweep: fine-tune, merge, score, report
	@$(BIN)/python run.py experiment=demo

report: $(INSTALLED)  ## Rebuild the demo's tables, plots and page from its records
	@$(BIN)/python -m twinbench.report suite=demo

test: $(INSTALLED)  ## Run the tests, on two cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

SEED ?= 1
COUNT ?= 150
mutants: $(INSTALLED)  ## Change COUNT lines of the code, one at a time, and list what no test notices (SEED draws them)
	@$(BIN)/python tests/mutants.py seed=$(SEED) count=$(COUNT)

lint: $(INSTALLED)  ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

BENCHMARKS := $(wildcard tests/benchmarks/*.py)
bench: $(INSTALLED)  ## Run every benchmark of speed and memory, one after the other
	@for file in $(BENCHMARKS); do echo "== $$file"; PYTHONPATH=. $(BIN)/python "$$file"; done
	@test -n "$(BENCHMARKS)" || echo "no benchmarks in tests/benchmarks"

clean:  ## Remove .venv and the caches of tools; results stay
	@rm -rf $(VENV) .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project itself is not installed: everything runs from this folder.
INSTALL := PYTHONUNBUFFERED=1 $(BIN)/pip install --disable-pip-version-check --require-hashes --no-deps
$(INSTALLED): requirements.lock requirements-cpu.lock requirements-cuda.lock
	@python=$(BIN)/python; test -x $$python || python="$(PYTHON)"; $$python -c 'import sys; v = sys.version_info; \
		sys.exit(0 if v >= (3, 11) else "twinbench needs Python 3.11 or newer, %s is %d.%d: try make PYTHON=python3.11 %s" \
		% (sys.executable, v[0], v[1], "$(MAKECMDGOALS)"))'
	@test -x $(BIN)/pip || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $$(grep -c == $<) packages into $(VENV)"
	@$(INSTALL) -r $< 2>&1 | tee $(VENV)/install.log | awk \
		'/^Collecting/ && ++n % 20 == 0 { print "  found", n } /^Installing collected/ { print "  unpacking" } { fflush() }' \
		|| { tail -n 20 $(VENV)/install.log; exit 1; }
	@echo "installing torch"; $(INSTALL) -q -r requirements-cpu.lock 2> $(VENV)/torch.log \
		|| $(INSTALL) -q -r requirements-cuda.lock || { cat $(VENV)/torch.log; exit 1; }
	@touch $@

# make demo and make test need nothing done before: they make .venv when it is missing.
#
#   PYTHON           the Python to build .venv with (3.11 or newer)
#   TORCH_INDEX_URL  an index to take torch from, such as a CPU-only one; empty: the index that pip is configured with
#   JOBS             test processes
#   ARGS             more arguments for pytest, or for the demo

PYTHON ?= python3
TORCH_INDEX_URL ?=
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST = $(BIN)/python -m pytest -n $(JOBS)

.PHONY: venv demo test test-all lint bench clean

venv: $(STAMP)

# The stamp is written last, so an install that was cut short is done again; a changed pin or dependency too.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lmtrain needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL) --no-deps) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,lint]'
	touch $@

demo: $(STAMP)
	$(BIN)/lmtrain demo $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	set -e; for file in benchmarks/*.py; do $(BIN)/python $$file; done

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

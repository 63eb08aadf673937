# Everything a person or CI runs. `make demo` and `make test` need Python 3.11 or newer, make and pip; the rest they install.

VENV   ?= .venv
# the first of these that is Python 3.11 or newer; expanded only when a virtual environment has to be made
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	if $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
EXTRAS := dev,plots,demo,hub,app
STAMP  := $(VENV)/.jeidnn-installed

# JOBS test processes with OMP_NUM_THREADS threads each: 2 x 1 suits the two cores of CI. JOBS=0 runs in one process.
JOBS            ?= 2
OMP_NUM_THREADS ?= 1
PYTEST_ARGS     ?=

.DEFAULT_GOAL := help
.PHONY: help venv test test-common demo docs lint clean

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		while IFS='|' read -r target text; do printf '  make %-11s %s\n' "$$target" "$$text"; done
	@echo "  e.g. make test JOBS=0 PYTEST_ARGS='tests/test_exits.py -x'"

venv: $(STAMP) ## make the virtual environment and install the package in it, once

# The stamp is touched last, so a failed or interrupted install is taken up again by the next make.
# Where ensurepip is missing (Debian without python3-venv), the pip that is there fills the environment.
$(STAMP): setup.py
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		test -n "$(PYTHON)" || { echo "Expected Python 3.11 or newer on PATH but got none; install python3.11 or set PYTHON=/path/to/python." >&2; exit 1; }; \
		echo "$(PYTHON) -m venv $(VENV)"; \
		if $(PYTHON) -c 'import ensurepip' >/dev/null 2>&1; then $(PYTHON) -m venv $(VENV); \
		else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; fi; \
	fi
	$(VENV)/bin/python -m pip install -e '.[$(EXTRAS)]'
	@touch $@

test: venv ## run the test suite, offline
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=$(OMP_NUM_THREADS) \
		$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-common: venv ## run transformers' own common model tests, which it downloads
	$(VENV)/bin/python -m pip install -q 'parameterized>=0.9,<1'
	$(VENV)/bin/python tests/common/fetch.py build
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(OMP_NUM_THREADS) PYTHONPATH=build \
		$(VENV)/bin/python -m pytest -o addopts=--import-mode=importlib -W ignore::pytest.PytestUnknownMarkWarning \
		-q -rfs $(PYTEST_ARGS) tests/common/suite.py

demo: venv ## train, evaluate and plot a small early-exit network; writes demo_output/
	$(VENV)/bin/jeidnn demo --output_dir demo_output

docs: venv ## build the documentation into site/; a warning fails it
	@$(VENV)/bin/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || $(VENV)/bin/python -m pip install -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: venv ## check style and imports with ruff
	$(VENV)/bin/ruff check .

clean: ## remove build leftovers, caches, site and demo_output; keeps the virtual environment
	rm -rf build dist site demo_output .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

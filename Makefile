# Everything is installed into .venv, at the versions in constraints.txt.
#   make PYTHON=python3.12 ...   uses that Python for .venv (after `make clean`, if there is a .venv)
#   make DEVICE=gpu ...          installs Paddle for GPUs instead of CPUs; give it each time, or export it.
#                                PyPI lacks that build: name Paddle's own index in PIP_EXTRA_INDEX_URL.
#   make ARGS="-k lora" test     passes more arguments to pytest, the demo or the benchmarks

DEVICE ?= cpu
ARGS ?=
BIN := .venv/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
MANIFESTS := constraints.txt pyproject.toml core/pyproject.toml $(PLUGINS:%=%/pyproject.toml)
NATIVE := $(wildcard plugins/*/setup.py plugins/*/native/*)

# The Pythons to try when none is given. Plain python3 comes first: it is what its user expects.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.12 python3.11 python3.10)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-sweep test-browser test-gpu test-gpu-parallel test-reliability test-plugin certify certify-faults lint format bench docs site clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

demo: .venv/installed-$(DEVICE) ## Install, then run the demo
	$(BIN)/sft demo $(ARGS)

# One process a core, each with one thread: faster than one process with all of them.
test: .venv/installed-test ## Run the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(ARGS)

# pytest exits with 5 when there is no such test, which is no failure here.
test-slow: .venv/installed-test ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "slow and not sweep" $(ARGS) || [ $$? -eq 5 ]

# Three quarters of an hour; ARGS="--share 0/8" runs the first of eight shares.
test-sweep: .venv/installed-test ## Run slow tests that cross plans with techniques, families and layouts
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "slow and sweep" $(ARGS) || [ $$? -eq 5 ]

# Needs chromium and its driver (Debian: chromium chromium-driver); without them each test says so, and is skipped.
test-browser: .venv/installed-test ## Look at the pages that sft makes, in a headless browser
	$(BIN)/pytest -m browser -rs $(ARGS) || [ $$? -eq 5 ]

# One process: several would share the GPU's memory. The table at the end is for an issue. Without a GPU there is one
# sentence, and pytest exits with 5.
test-gpu: .venv/installed-test ## Check a GPU, within ten minutes: make DEVICE=gpu test-gpu
	$(BIN)/pytest -m gpu -rs $(ARGS) || [ $$? -eq 5 ]

# Some 50 short runs on two GPUs, 80 on four. Without DEVICE=gpu two processes on CPUs: nine minutes on two cores.
test-gpu-parallel: .venv/installed-test ## Check 2, 4 or 8 GPUs together: make DEVICE=gpu test-gpu-parallel
	$(BIN)/python -m benchmarks.parallel_checks --device $(DEVICE) $(ARGS)

# Hours. Each test carries its own limit of time. The figures are kept even if some test fails.
test-reliability: .venv/installed-test ## Try everything that a run must survive, for hours, and write docs/reliability.md
	SFT_RELIABILITY=whole OMP_NUM_THREADS=1 $(BIN)/pytest tests/reliability -m "not gpu" $(ARGS); \
	    code=$$?; $(BIN)/python tests/reliability/figures.py; exit $$code

# Hours for all of them; docs/certify.md says how long one takes. ARGS names some of them, or is --quick: each two once.
certify: .venv/installed-test ## Certify the plugins: writes docs/certified/, from which the README's matrix is made
	$(BIN)/python tests/certify/all_plugins.py $(ARGS)

certify-faults: .venv/installed-test ## Put faults into plugins and certify those: writes docs/certify.json
	$(BIN)/python tests/certify/seed.py $(ARGS)

test-plugin: ## Test one plugin alone with the core, in a venv of its own: make test-plugin NAME=peft_vera
	@test -f plugins/$(NAME)/pyproject.toml || { echo "Give NAME=, one of: $(notdir $(PLUGINS))." >&2; exit 2; }
	@echo "Installing the core and plugins/$(NAME) alone into .venv-$(NAME)."
	@$(MAKE) --no-print-directory .venv/bin/pip
	@.venv/bin/python -m venv --clear .venv-$(NAME)
	@.venv-$(NAME)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e "core[$(DEVICE)]" -e plugins/$(NAME) pytest pytest-timeout
	.venv-$(NAME)/bin/pytest plugins/$(NAME)/tests $(ARGS)

lint: .venv/installed-dev ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-dev ## Put the code into the house format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: .venv/installed-$(DEVICE) ## Run the benchmarks beside other programs: two to four hours; ARGS="steps" runs one
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/installed-test ## Generate the pages in docs/ that are made, and the picture of the floors; then the site
	$(BIN)/python docs/screenshots.py
	$(BIN)/python scripts/import_graph.py --write
	$(BIN)/python -m benchmarks.page
	$(BIN)/python tests/reliability/figures.py
	$(BIN)/python docs/generate.py
	@$(MAKE) --no-print-directory site

# Pages in English and Chinese that need no network. Each build knows its own pages, words and search alone.
site: .venv-docs/installed ## Build the site from docs/ into site/, with warnings as errors
	.venv-docs/bin/sphinx-build -q -W --keep-going -j auto -c docs . site/en
	.venv-docs/bin/sphinx-build -q -W --keep-going -j auto -c docs -t zh . site/zh
	.venv-docs/bin/python docs/check_site.py site
	@echo "site/en/docs/index.html and site/zh/docs/zh/index.html are there."

.venv-docs/installed: docs/requirements.txt | .venv/bin/pip
	@echo "Installing what builds the site into .venv-docs."
	@$(BIN)/python -m venv --clear .venv-docs
	@.venv-docs/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

clean: ## Remove .venv and all caches
	rm -rf .venv .venv-* site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each candidate is tried by really making the environment: a command of that name may exist and
# yet not run (a version manager's shim), or run and lack the venv module.
.venv/bin/pip:
	@for python in $(PYTHONS); do \
	    $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 \
	        && $$python -m venv --clear .venv >/dev/null 2>&1 && exit 0; \
	done; \
	rm -rf .venv; \
	echo "No Python 3.10, 3.11 or 3.12 that can make a virtual environment (tried: $(PYTHONS)); give one with PYTHON=/path/to/python." >&2; \
	exit 2

# One pip command, so that pip takes the parts from here and not from an index. The other build of
# Paddle goes first: both install the same package, and neither works on top of the other.
.venv/installed-cpu .venv/installed-gpu: .venv/installed-%: $(MANIFESTS) $(NATIVE) | .venv/bin/pip
	@echo "Installing sft, its plugins and Paddle ($*) into .venv: about two minutes."
	@rm -f .venv/installed-*
	@$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes $(if $(filter gpu,$*),paddlepaddle,paddlepaddle-gpu) 2>/dev/null
	@$(PIP_INSTALL) -e core $(PLUGINS:%=-e %) -e ".[all,$*]"
	@touch $@

.venv/installed-test .venv/installed-dev: .venv/installed-%: .venv/installed-$(DEVICE)
	@echo "Installing the $* tools into .venv."
	@$(PIP_INSTALL) -e ".[$*]"
	@touch $@

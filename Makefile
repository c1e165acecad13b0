# `make help` lists the targets. Everything is installed in .venv, except for the system packages listed in
# tools/system-packages, which are installed if run as root and only reported otherwise.

PYTHON ?= $(shell tools/choose-python)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find firezone_tunnel twisted_plugins -type f -not -name '*.pyc')
TEST_HELPERS := $(shell find tests -name '*.py' -not -name 'test_*.py')
SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test bench bench-core lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## create .venv and install the program and its tools

demo: $(VENV)/installed ## run a tunnel on hosts made of namespaces; KEEP=1 leaves it running; NAT=symmetric, NAT=cone,none, … add NATs
	@tools/system-packages demo
	@$(BIN)/python -m demo $(if $(KEEP),--keep) $(if $(NAT),--nat $(NAT))

test: $(VENV)/installed ## run all tests; those with network namespaces need root
	@tools/system-packages test
	tools/run-tests $(BIN)/python $(PYTEST_ARGS)

bench: $(VENV)/installed ## compare with wireguard-go and coturn on the same hosts; BENCH_ARGS='--rounds 1 --seconds 2' for a quick run
	@tools/system-packages bench
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-core: $(VENV)/installed ## measure the packet path and changes without I/O, in microseconds
	$(BIN)/python -m benchmarks.core

lint: $(VENV)/installed ## check style, types, imports and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p firezone_tunnel
	$(BIN)/mypy --explicit-package-bases --namespace-packages benchmarks demo docs/examples tools $(TEST_HELPERS)
	$(BIN)/lint-imports
	tools/lint-shell

docs: $(VENV)/installed ## generate the pages on options and state machines
	$(BIN)/python tools/options_reference.py docs/options.md
	$(BIN)/python tools/state_diagrams.py docs/state-machines.md

clean: ## remove .venv and all build products
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two steps, so that a changed source file does not cause pip to resolve all dependencies again.
$(VENV)/dependencies: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'setuptools >= 70' wheel
	rm -rf build *.egg-info
	$(BIN)/pip install --quiet --no-build-isolation '.[test,lint]'
	@touch $@

# Not an editable installation, because twistd would not find its plugins.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES) README.md
	rm -rf build *.egg-info
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build *.egg-info
	@touch $@

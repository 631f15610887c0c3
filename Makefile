# Needs only make and a Python of 3.11 or newer; everything else goes into $(VENV).
#
#   make demo     run the example program with its own servers
#   make test     run all tests
#   make check    style, types, layers, docs, tests: what a change must pass
#   make verify   generated files in docs/ are up to date
#   make bench    measure Sagacity, the bare parts and its peers on this machine: some 20 minutes
#   make bench-quick   the same in one minute, without the peers
#   make guard    instructions per message against those kept in benchmarks/guard.json (needs valgrind)
#   make clean    remove the environment and everything built

VENV ?= .venv
BIN := $(VENV)/bin
# 3.12 and 3.11 first: for them a redis-server comes as a wheel, should the machine have none.
PYTHONS := python3.12 python3.11 python3.14 python3.13 python3
# The first that runs, is new enough, and can make environments (Debian ships that part apart).
USABLE = 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for each in $(PYTHONS); do \
	$$each -c $(USABLE) >/dev/null 2>&1 && { echo $$each; break; }; done)

INSTALL-demo := -e .[embedded,rich] --group examples
INSTALL-test := -e .[all] --group examples --group test
INSTALL-bench := -e .[all] --group bench
INSTALL-dev := -e .[all] --group dev
# One that is there already spares the smaller ones.
READY-demo = $(firstword $(wildcard $(VENV)/.ready-dev $(VENV)/.ready-test) $(VENV)/.ready-demo)
READY-test = $(firstword $(wildcard $(VENV)/.ready-dev) $(VENV)/.ready-test)
READY-bench = $(firstword $(wildcard $(VENV)/.ready-dev $(VENV)/.ready-test) $(VENV)/.ready-bench)

.PHONY: demo test check lint docs verify requirements bench bench-quick guard clean
.DEFAULT_GOAL := test

demo: $(READY-demo)
	$(BIN)/python -m examples.batch_import demo

test: $(READY-test)
	$(BIN)/python -m pytest

check: lint docs test

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

verify: $(READY-test)
	$(BIN)/python -m tests.requirements_table --check

requirements: $(READY-test)
	$(BIN)/python -m tests.requirements_table
	$(BIN)/python -m tests.docs.generated

# Peers are installed in environments of their own. The page is written also after failures, which it
# lists; the status is that of the run.
bench: $(READY-bench)
	@status=0; $(BIN)/python -m benchmarks.run || status=$$?; \
		$(BIN)/python -m benchmarks.report; exit $$status

guard: $(READY-test)
	$(BIN)/python -m benchmarks.guard
	$(BIN)/python -m benchmarks.guard --control

bench-quick: $(READY-bench)
	$(BIN)/python -m benchmarks.run --quick

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no usable Python found (expected one of: $(PYTHONS)," \
		"version 3.11 or newer, with venv). On Debian or Ubuntu run: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'

$(VENV)/.ready-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INSTALL-$*)
	@touch $@

clean:
	rm -rf $(VENV) benchmarks/.venvs build dist site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Needs Python 3.11 or newer with venv and pip; everything else is installed into .venv.
PYTHON ?= python3
ARGS ?=

# Neighbours stay in one process, which shares servers among them, until the other has nothing left.
IN_TWO = --numprocesses 2 --dist worksteal
PIP = -m pip --disable-pip-version-check --no-input --quiet
COMPILE = build/uv/bin/uv pip compile pyproject.toml --all-extras --group dev --universal \
	--generate-hashes --no-header --no-annotate --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test simulate breaks races faults fuzz check screenshots bench bench-full lock test-floors clean
.DELETE_ON_ERROR:

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.ready ## Serve the example on this machine (ARGS="--port 9000").
	@.venv/bin/tfm-guard demo $(ARGS)

test: .venv/.ready ## Run the whole test suite in two processes (ARGS="-k revoke").
	@.venv/bin/python -m pytest $(IN_TWO) $(ARGS)

simulate: .venv/.ready ## Search simulated failures for long (ARGS="--seed 1 --steps 1000000").
	@.venv/bin/python -m tests.simulation $(ARGS)

breaks: .venv/.ready ## Break each rule of the code in turn: something must fail, for some 5 minutes.
	@.venv/bin/python -m tests.simulation.all_breaks

races: .venv/.ready ## Change the same keys at the same time, 10,000 times on each database.
	@.venv/bin/python -m tests.flows.interleavings $(ARGS)

faults: .venv/.ready ## Try every fault on real servers, for some 25 minutes (ARGS="7 31").
	@.venv/bin/python -m tests.faults $(ARGS)

fuzz: .venv/.ready ## Send the management API what it does not expect, for minutes (ARGS="--seed 1").
	@.venv/bin/python -m tests.fuzz $(ARGS)

check: .venv/.ready ## Lint; check the formatting, the types and the floors (who imports whom).
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/python -m pytest -q tests/project/test_floors.py

screenshots: .venv/.ready ## Make a picture of each state of the page in docs/screenshots.
	@.venv/bin/python -m tests.console

bench: .venv/.ready ## Measure every performance target within 3 minutes (ARGS=--json).
	@.venv/bin/python -m benchmarks.everything $(ARGS)

bench-full: .venv/.ready ## Measure for 12 minutes, others too; write benchmarks/results and the README.
	@.venv/bin/python -m benchmarks.everything --results benchmarks/results $(ARGS); \
		missed=$$?; .venv/bin/python -m benchmarks.quote && exit $$missed

lock: build/uv/.ready ## Resolve both lock files anew: newest versions, oldest allowed ones.
	@$(COMPILE) --upgrade -o requirements/dev.lock
	@$(COMPILE) --upgrade --resolution lowest-direct -o requirements/floors.lock

test-floors: .venv-floors/.ready ## Run the suite on the oldest versions that pyproject.toml allows.
	@.venv-floors/bin/python -m pytest $(IN_TWO) $(ARGS)

clean: ## Remove what the other targets made, except the lock files.
	@rm -rf .venv .venv-floors build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	@find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# One recipe for both environments: .venv from dev.lock, .venv-floors from floors.lock.
.venv/.ready: requirements/dev.lock
.venv-floors/.ready: requirements/floors.lock
.venv/.ready .venv-floors/.ready: pyproject.toml
	$(require-python)
	@echo "Installing $(filter %.lock,$^) into $(@D) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP) install --require-hashes -r $(filter %.lock,$^)
	@$(@D)/bin/python $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

build/uv/.ready:
	$(require-python)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP) install uv
	@touch $@

define require-python
@command -v $(PYTHON) >/dev/null || { \
	echo "'$(PYTHON)' was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Python 3.11 or newer is needed, '$(PYTHON)' is `$(PYTHON) -V 2>&1`: make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
endef

# `make help` lists the targets. Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= demo-run
DATA ?=
WEIGHTS ?=
EXTRA ?= dev
BENCH ?=
IMAGE = $(if $(filter predict train-gpu,$(EXTRA)),$(EXTRA),train)
CONTAINERS ?= /var/tmp/nucleus-containers

.DEFAULT_GOAL := help

.PHONY: help install demo test test-fast test-ray test-others bench check audit lock image containers clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed-$(EXTRA) ## create .venv with all packages (hash-locked)

$(VENV)/.installed-$(EXTRA): requirements/$(EXTRA).txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed; found: $$($(PYTHON) --version 2>&1). Run: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "Python's venv module is incomplete. On Debian run: apt-get install python3.11-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements/$(EXTRA).txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## import, train, publish and predict: DATA=zip-or-folder WEIGHTS=file WORKDIR=folder
	$(BIN)/nucleus demo $(if $(DATA),"$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") --workdir "$(WORKDIR)"

test: install ## every test: test-ray and test-others at the same time
	@echo "Two sessions at the same time; the output of each appears when it has ended (live: make test-ray)."
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-ray test-others

test-fast: install ## the tests that use no server and no Ray cluster
	@$(BIN)/python -m pytest tests -m "not ray and not server"

# Both run at the same time, because each waits during part of it. The second has lower priority, because runs on a
# cluster have timeouts and Ray starts its workers at niceness 15.
test-ray: install
	@$(BIN)/python -m pytest tests -m ray

test-others: install
	@nice -n 19 $(BIN)/python -m pytest tests -m "not ray"

bench: install ## the benchmarks, one JSON line each: BENCH="step_rate scaling" for some
	$(BIN)/python -m tests.benchmarks $(BENCH)

check: install ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: install ## known vulnerabilities in the locked packages, and risky calls in this one
	for lock in cpu gpu dev; do $(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/$$lock.txt || exit 1; done
	$(BIN)/bandit --quiet --recursive --severity-level medium nucleus job

lock: install ## rewrite requirements/*.txt
	$(BIN)/python requirements/lock.py

image: ## build the container image nucleus:train; with EXTRA=predict or EXTRA=train-gpu another one (docker)
	docker build --tag nucleus:$(IMAGE) --build-arg EXTRA=$(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD) .

containers: ## docs/infra/local.md on a real Docker Engine, which this installs (root, Debian; 1 hour): CONTAINERS=folder
	@python3 -m tests.containers "$(CONTAINERS)"

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

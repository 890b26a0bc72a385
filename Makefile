# `make help` lists the targets. Everything lives in .venv; nothing outside this folder is touched.
PYTHONS := 3.11 3.12 3.13
# 3.11 comes first, because the images have it, and a cluster and its driver need the same.
PYTHON ?= $$(sh requirements/find_python.sh $(PYTHONS))
INSTALLER ?= uv
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := predict train train-gpu dev
EXTRA ?= dev
WORKDIR ?= demo-run
DATA ?=
MODEL := nuclei
INCLUDED := nucleus/registry/included/$(MODEL)
WEIGHTS ?=
BENCH ?=
GPU_CHECK ?=
IMAGE = $(if $(filter predict train-gpu,$(EXTRA)),$(EXTRA),train)
CONTAINERS ?= /var/tmp/nucleus-containers
LOCK_FLAGS ?=
TYPESCRIPT := 5.9.3

INSTALLED := $(VENV)/.installed-
DEV := $(INSTALLED)dev
# The demo runs in what is installed, or else in the smallest that can.
DEMO := $(firstword $(wildcard $(INSTALLED)dev $(INSTALLED)train) $(INSTALLED)train)

# What is installed, or else what a GPU needs.
GPU_ENVIRONMENT := $(firstword $(wildcard $(INSTALLED)train-gpu $(INSTALLED)dev $(INSTALLED)train) $(INSTALLED)train-gpu)

$(if $(filter $(EXTRA),$(EXTRAS)),,$(error EXTRA is "$(EXTRA)"; expected one of: $(EXTRAS)))

.DEFAULT_GOAL := help

.PHONY: help install demo model test test-fast test-ray test-others test-pythons test-wheel bench gpu-check check check-page audit lock image containers clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)$(EXTRA) ## create .venv from a lock: EXTRA=predict, train, train-gpu or dev (default)

$(INSTALLED)%: requirements/%.txt pyproject.toml
	@python="$(PYTHON)" && "$$python" requirements/install.py --installer "$(INSTALLER)" "$(VENV)" "$*"

demo: $(DEMO) ## import, train, publish and predict: DATA=zip-or-folder WEIGHTS=file WORKDIR=folder
	$(BIN)/nucleus demo $(if $(DATA),"$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") --workdir "$(WORKDIR)"

# A run that was interrupted is continued. The variables of the server are set for these commands alone.
model: WORKDIR := model-run
model: $(DEMO) ## train the model that comes along, and put it into the package: DATA=stage1_train.zip WEIGHTS=file WORKDIR=folder
	$(if $(and $(DATA),$(WEIGHTS)),,$(error DATA and WEIGHTS are needed: make model DATA=stage1_train.zip WEIGHTS=mobilenet_v2.weights.h5))
	@set -e; PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH WANDB_MODE=disabled XDG_CACHE_HOME="$(abspath $(WORKDIR))/cache"; \
	variables=$$(nucleus store start --dir "$(WORKDIR)/store" --port 0); eval "$$variables"; \
	trap 'nucleus store stop --dir "$(WORKDIR)/store"' EXIT; \
	nucleus data import "$(DATA)" dsb2018; \
	nucleus weights add "$(WEIGHTS)"; \
	if nucleus runs show $(MODEL) > /dev/null 2>&1; then nucleus train --resume $(MODEL) --out "$(WORKDIR)/runs"; \
	else nucleus train $(MODEL) --run $(MODEL) --out "$(WORKDIR)/runs"; fi; \
	nucleus models pull $(MODEL)@latest "$(WORKDIR)/half" --half; \
	rm -rf "$(INCLUDED)"; mkdir -p "$(dir $(INCLUDED))"; cp -R "$(WORKDIR)/half" "$(INCLUDED)"; \
	sha256sum "$(INCLUDED)/manifest.json"

test: $(DEV) ## every test: test-ray and test-others at the same time
	@echo "Two sessions at the same time; the output of each appears when it has ended (live: make test-ray)."
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-ray test-others

test-fast: $(DEV) ## the tests that use no server and no Ray cluster, and compute for a few seconds at most
	@$(BIN)/python -m pytest tests -m "not ray and not server and not slow"

# Both run at the same time, because each waits during part of it. The second has lower priority, because runs on a
# cluster have timeouts and Ray starts its workers at niceness 15.
test-ray: $(DEV)
	@$(BIN)/python -m pytest tests -m ray

test-others: $(DEV)
	@nice -n 19 $(BIN)/python -m pytest tests -m "not ray"

test-pythons: test-fast-3.12 test-fast-3.13 ## the fast tests on the other Pythons, each in an environment of its own

# With lower priority, for the same reason.
test-fast-%:
	@python="$$(sh requirements/find_python.sh $*)" && \
	  nice -n 19 $(MAKE) --no-print-directory test-fast VENV=.venv-$* PYTHON="$$python"

test-wheel: $(DEV) ## the wheel alone, in a fresh environment without TensorFlow and Ray
	@$(BIN)/python -m pytest tests/test_clean_room.py

bench: $(DEV) ## the benchmarks, one JSON line each: BENCH="step_rate scaling" for some
	$(BIN)/python -m tests.benchmarks $(BENCH)

# It needs a GPU's TensorFlow and the embedded server: make install EXTRA=train-gpu && .venv/bin/uv pip install ministack
gpu-check: $(GPU_ENVIRONMENT) ## what a GPU does with this package, in a table: DATA=zip WEIGHTS=file GPU_CHECK="--budget 300 --json"
	@$(BIN)/python -m tests.benchmarks.gpu_check $(if $(DATA),--data "$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(GPU_CHECK)

check: $(DEV) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-page: ## types of the page's JavaScript; needs npm, which fetches the compiler
	npx --yes --package typescript@$(TYPESCRIPT) tsc --noEmit --allowJs --checkJs --strict --noUnusedLocals \
	  --target es2022 --module es2022 --moduleResolution bundler --lib es2023,dom,dom.iterable nucleus/page/static/js/*.js

audit: $(DEV) ## known vulnerabilities in the locked packages, and risky calls in this one
	for lock in $(EXTRAS); do $(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/$$lock.txt || exit 1; done
	$(BIN)/bandit --quiet --recursive --severity-level medium nucleus job

lock: $(DEV) ## rewrite requirements/*.txt: LOCK_FLAGS=--upgrade for newer versions
	$(BIN)/python requirements/lock.py $(LOCK_FLAGS)

image: ## build the container image nucleus:train; with EXTRA=predict or EXTRA=train-gpu another one (docker)
	docker build --tag nucleus:$(IMAGE) --build-arg EXTRA=$(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD) .

containers: ## docs/infra/local.md on a real Docker Engine, which this installs (root, on Debian; an hour): CONTAINERS=folder
	@python3 -m tests.containers "$(CONTAINERS)"

clean: ## remove the environments and caches
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache build *.egg-info

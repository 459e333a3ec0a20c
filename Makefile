# Needs Python 3.11 to 3.13, make and git; everything else comes into $(VENV) by itself.
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
WORKERS ?= 2
PYTEST_ARGS ?=
EXAMPLES ?= 1
PYTHON ?= python3
GPU_CHECK_ARGS ?=

BIN := $(VENV)/bin
# A worker that has nothing left to do takes half of what another one has.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# One thread per test worker and no pool of compilers beside it, threads that sleep while they wait, and never a word
# with a hub.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
  OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
  HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1 LONGTHINK_EXAMPLES=$(EXAMPLES)

.DEFAULT_GOAL := help
.PHONY: help setup ready ready-demo demo test test-fast test-matrix test-vllm test-vllm-matrix gpu-check lint format build site clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make or refresh .venv with all tools, with uv if it is there, else venv and pip
	@scripts/setup.sh "$(VENV)"

ready:
	@scripts/setup.sh --quiet "$(VENV)"

# What the demo needs and no more: the tools come when something calls for them.
ready-demo:
	@scripts/setup.sh --quiet --demo "$(VENV)"

demo: ready-demo ## Solve a long problem with four caches side by side
	@$(BIN)/longthink demo

test: ready ## Run all tests (15 to 22 minutes on 2 vCPUs, one core, of an Intel Xeon)
	$(TEST_ENV) $(PYTEST) $(PYTEST_ARGS)

test-fast: ready ## Run the quick tests (a minute and a half on the same)
	$(TEST_ENV) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Not in CI: each environment takes 3 GB and some minutes to make, and the tests two.
test-matrix: ## Run the quick tests with the oldest and the newest torch and transformers, in .venv-oldest and .venv-newest
	@failed=0; for age in oldest newest; do \
	  scripts/setup.sh --quiet --$$age .venv-$$age && echo "== $$age" && \
	  $(TEST_ENV) .venv-$$age/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS) || failed=1; \
	done; exit $$failed

# One worker: a server of vLLM has several processes of its own.
test-vllm: ## Run the tests of the vLLM plugin against vLLM for the CPU, in .venv-vllm (half an hour)
	@scripts/setup.sh --quiet --vllm "$(VLLM_VENV)"
	$(TEST_ENV) $(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

# Both ends of the range in pyproject.toml for which there is a build for CPUs.
VLLM_MATRIX ?= 0.30.0 0.32.0
MATRIX_TESTS := symbols checks manager decoder requests lists identity

test-vllm-matrix: ## Run the identity tests against the oldest and the newest vLLM, each in .venv-vllm-VERSION (an hour)
	@set -e; for version in $(VLLM_MATRIX); do \
	  echo "== vLLM $$version"; scripts/setup.sh --quiet --vllm=$$version; \
	  $(TEST_ENV) .venv-vllm-$$version/bin/python -m pytest $(MATRIX_TESTS:%=tests/vllm/test_%.py) $(PYTEST_ARGS); \
	done

# On a machine with a GPU: with its own Python, and without .venv.
gpu-check: ## Test and time everything on this machine's GPU, in nine minutes (GPU_CHECK_ARGS=--self-test needs none)
	$(PYTHON) scripts/gpu_check $(GPU_CHECK_ARGS)

lint: ready ## Check style, types and the arrows between packages
	@failed=0; for check in "ruff check --output-format concise ." "ruff format --check ." mypy "lint-imports --no-logo"; do \
	  echo "== $$check"; $(BIN)/$$check || failed=1; \
	done; exit $$failed

format: ready ## Put the code in its one format, fix what can be fixed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Dated by the commit, so that the same commit gives the same bytes anywhere.
build: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct 2>/dev/null || echo 1580601600)
build: ready ## Build the two wheels and the sdist into dist/ and check what is inside
	rm -rf dist
	$(BIN)/hatchling build -t sdist -t wheel
	cd lab && $(abspath $(BIN))/hatchling build -t wheel -d ../dist
	$(BIN)/python scripts/check_dist.py dist

# A report of real models and an attention page stand in it, as examples.
site: ready ## Build the documentation site into build/site, with every link checked (half a minute)
	rm -rf build/site build/reports build/traces && mkdir -p build/reports
	$(BIN)/longthink report benchmarks/real-models --out build/report
	$(BIN)/longthink trace --tasks reasoner/s/chain -n 1 --with-vectors --top 0 --out build/traces
	$(BIN)/longthink report build/traces --out build/report
	mv build/report/report.html build/reports/real-models.html
	mv build/report/attention.html build/reports/attention.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## Remove what the tools left (not .venv)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

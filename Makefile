# Every target does all set-up that it needs by itself; a second run does none of it again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
# Test files side by side: the processes that tests start spend their time with imports, on one core.
JOBS ?= 2
# Engines in the tests' own process get OpenMP as the plugin gives it to worker processes; tiny
# models are fastest on one thread.
PYTEST = LD_PRELOAD=$$(ls $(CURDIR)/.venv/lib/libiomp5.so 2>/dev/null) OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
PREPARE := $(BIN)/python -m vllm_stairs.prepare --models-dir models

.PHONY: help setup models demo serve test test-full lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## make .venv with everything in it (CPU)
	@scripts/setup.sh

models: setup ## prepare models/: SmolLM2-135M-Instruct and its test drafts
	@$(PREPARE) all

demo: setup ## the main job: serve with stairs, chat, show the speculation figures
	@$(PREPARE) smollm2
	@$(PREPARE) draft
	@$(BIN)/python examples/demo.py $(ARGS)

serve: setup ## the demo's server on port 8000, to talk to (examples/client.py)
	@$(PREPARE) smollm2
	@$(PREPARE) draft
	@$(BIN)/python examples/demo.py --serve $(ARGS)

test: setup models ## the tests (ARGS='-k name' to choose)
	$(PYTEST) -m "not full" $(ARGS)

test-full: setup models ## the tests with the whole matrices
	$(PYTEST) $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples

format: setup ## ruff, writing its changes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets above made, models and environment included
	rm -rf .venv models results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +

.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow soak gpu-check lint format clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@

install: $(INSTALLED)  ## Make the environment in .venv (some minutes: PyTorch is large)

demo: $(INSTALLED)  ## Install, then train the smallest backbone on generated shapes
	$(BIN)/e3va train

test: $(INSTALLED)  ## Install, then run the tests that need no GPU and little time
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile

test-slow: $(INSTALLED)  ## Run the tests that take long
	$(BIN)/python -m pytest -m "slow and not gpu"

soak: $(INSTALLED)  ## Watch a run of 2,000 steps: memory, files and threads must not grow (20 minutes)
	$(BIN)/python scripts/soak.py

gpu-check: $(INSTALLED)  ## On a machine with a CUDA GPU: its tests and the measured benchmark, into benchmarks/
	$(BIN)/python scripts/gpu_check.py

lint: $(INSTALLED)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Mend style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and what tools leave behind
	rm -rf $(VENV) .venv-ci build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

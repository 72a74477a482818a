# Every target works from a fresh clone: it makes .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet

# Without an NVIDIA driver, Linux gets torch's CPU build or a message: never gigabytes of CUDA.
GPU := $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi))
VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= torch==$(VERSION)$(if $(filter Linux,$(shell uname -s)),$(if $(GPU),,+cpu))
PIP_TORCH_ARGS ?=

define NO_TORCH
pip finds no $(TORCH) for $(shell $(PYTHON) --version). Two ways on:
  make PIP_TORCH_ARGS='--index-url ADDRESS'   the CPU index; its address is on PyTorch's install page
  make TORCH=torch==$(VERSION)                the default build, several GB with CUDA
endef
export NO_TORCH

# A change in the C++ extension is built by the next target. pip tells nobody that it could not be.
NATIVE := $(wildcard native/*)
NO_NATIVE := the C++ extension was not built (is there a C++ compiler?); everything works, slower
define CHECK_NATIVE
@$(BIN)/python -c 'import gemsmith._native' 2>/dev/null || echo "$(NO_NATIVE)"
endef

.PHONY: demo test lint format bench bench-26B bench-serve soak clean

demo: $(VENV)/.run
	@$(BIN)/gemsmith demo

test: $(VENV)/.dev
	@$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

# The benchmarks named run in turn until one fails; the table of what must be reached comes anyway.
NUMBERS ?= build/numbers
define BENCH
@failed=0; for run in $(1); do \
  $(BIN)/python -m benchmarks.$$run --record $(NUMBERS) || { failed=$$?; break; }; done; \
  $(BIN)/python -m benchmarks.report $(NUMBERS) && exit $$failed
endef

# An hour and 20 GB of disk, most of it beside llama.cpp and Transformers.
# `make bench NUMBERS=docs/numbers` updates docs/numbers.md.
bench: $(VENV)/.dev
	$(call BENCH,kernels 'decode --bits 4' 'memory --bits 4' 'decode --bits mobile' \
	  'memory --bits mobile' peers prefill memory media fit grammar)

# A quarter of an hour, 43 GB of disk more, and 16 GB of memory free.
bench-26B: $(VENV)/.dev
	$(call BENCH,'peers --size 26B-A4B')

# Half an hour, the first time 15 minutes more to compile llama.cpp.
bench-serve: $(VENV)/.dev
	$(call BENCH,conformance 'serve --model pocket' 'agent --model pocket' 'serve --model E2B' \
	  'agent --model E2B')

# An hour.
soak: $(VENV)/.dev
	$(call BENCH,soak)

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"gemsmith needs Python 3.11 or newer, this is {sys.version}; try make PYTHON=python3.11")'
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(PIP_TORCH_ARGS) '$(TORCH)' || { echo "$$NO_TORCH" >&2; exit 1; }
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@$(PIP) -e .
	$(CHECK_NATIVE)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@$(PIP) -e '.[dev]'
	$(CHECK_NATIVE)
	@touch $@ $(VENV)/.run

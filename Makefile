# Every target that needs the environment makes it first: .venv, filled from requirements/lock.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
# A test runs on one thread (tests/conftest.py), so up to four cores take some each.
PYTEST := python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
LOCK := requirements/lock.txt
STAMP := $(VENV)/.installed
# On Linux pip's default torch is the CUDA build, several GB: `make test-latest TORCH=2.13.0` takes that one instead of the
# newest, which is how to stay with a CPU build that is on offer.
TORCH :=
LOCKED_TORCH := $(shell sed -n 's/^torch==//p' $(LOCK))
NO_PYTHON = $(error Python 3.11 or newer with venv not found: set PYTHON=/path/to/python3.11)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The interpreter that makes .venv: `make test PYTHON=python3.12` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help setup demo test test-slow test-latest quality style lock wheels gpu gpu-full clean

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install the locked environment (the targets below do it by themselves)

demo: $(STAMP)  ## segment drawn street scenes, dense and merged; the picture goes to demo_output/
	$(BIN)/ailurus-hf demo --out demo_output

test: $(STAMP)  ## run the tests
	$(BIN)/$(PYTEST) $(ARGS)

test-slow: $(STAMP)  ## run the slow tests, which `make test` leaves out
	$(BIN)/$(PYTEST) -m slow --timeout 3600 $(ARGS)

test-latest:  ## run the tests with the newest release of everything, in .venv-latest (TORCH=2.13.0 holds torch)
	$(if $(PYTHON),,$(NO_PYTHON))
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet "torch$(if $(TORCH),==$(TORCH))" --editable ".[dev]"
	@$(LATEST)/bin/python -m pip freeze | grep -i -E '^(torch|transformers|huggingface.hub|accelerate|numpy)=='
	$(LATEST)/bin/$(PYTEST) $(ARGS)

quality: $(STAMP)  ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## write requirements/lock.txt anew: same torch, newest of the rest
	$(if $(PYTHON),,$(NO_PYTHON))
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --upgrade --quiet "torch==$(LOCKED_TORCH)" "setuptools>=77.0.3"
	build/lock/bin/python -m pip install --quiet ".[dev]"
	@{ sed -n '/^#/p' $(LOCK); build/lock/bin/python -m pip freeze --all \
		| sed -E -e 's/^(torch==[^+]*)[+].*/\1/' -e "s/^triton==.*/triton; sys_platform == 'linux'/" \
		| grep -v -i -E '^(ailurus-hf|pip|wheel|nvidia-.*|cuda-.*)([ =]|$$)'; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf build/lock

wheels:  ## fill wheels/ with what `make gpu` needs beside torch, for a machine without network
	$(if $(PYTHON),,$(NO_PYTHON))
	$(PYTHON) -m pip download --quiet --no-deps --dest wheels $$(grep -v -i -E '^(#|$$|torch==)' $(LOCK))

# With the torch that is there: no .venv. What wheels/ lacks must be installed.
GPU_PYTHON := $(if $(wildcard wheels),PYTHONPATH=build/gpu:. )$(PYTHON)

build/gpu:
	$(if $(wildcard wheels),$(PYTHON) -m pip install --quiet --no-index --no-deps --target $@ wheels/*.whl,@true)

gpu: build/gpu  ## on a CUDA device: its tests, then six minutes of times of the plain and merged model; build/gpu.md
	@mkdir -p build
	-$(GPU_PYTHON) -m pytest tests/test_cuda.py -n 0 $(ARGS)
	$(GPU_PYTHON) benchmarks/gpu.py --minutes 6 --out build/gpu.jsonl

gpu-full: build/gpu  ## the whole matrix of times on a CUDA device, for hours; goes on where it stopped
	@mkdir -p build
	$(GPU_PYTHON) benchmarks/gpu.py --full --minutes 1440 --out build/gpu.jsonl

clean:  ## remove .venv, caches and build output
	rm -rf $(VENV) $(LATEST) build dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): $(LOCK) pyproject.toml
	$(if $(PYTHON),,$(NO_PYTHON))
	@echo "Setting up $(VENV) from $(LOCK): once, a few minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m pip check
	@touch $@

# `make` alone lists the targets.
PYTHON      ?= python3
VENV        ?= .venv
# Where pip finds torch, if not where it finds everything else (a PyTorch wheel index for your CUDA version or for CPUs).
TORCH_INDEX ?=
DEMO        ?= demo
OUT         ?= benchmarks/results

BIN         := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALLED   := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-dist test-all lint bench gpu clean

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install everything pinned in constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[demo,dev,onnx]'
	@touch $@

demo: $(INSTALLED)  ## real digits -> shards -> FAT-B0 trained: accuracy, batch.png, curves.png in demo/
	@BIN=$(BIN) DEMO=$(DEMO) bash launch/demo.sh

test: lint test-unit test-dist  ## lint, unit tests, several-process tests

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit -m "not gpu and not slow"

test-dist: $(INSTALLED)
	$(BIN)/python -m pytest tests/dist -m "not gpu and not slow"

test-all: lint $(INSTALLED)  ## every test, the long campaigns too
	$(BIN)/python -m pytest tests -m "not gpu"

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the loader and model benchmarks of this machine -> benchmarks/results/
	$(BIN)/python benchmarks/loader.py --out $(OUT)/loader.json

gpu:             ## all GPU tests and benchmarks with PYTHON as it is (no .venv): make gpu PYTHON=python3 OUT=dir
	PYTHONPATH=.:$(PYTHONPATH) $(PYTHON) -m pytest tests -m gpu -p no:cacheprovider
	mkdir -p $(OUT)
	PYTHONPATH=.:$(PYTHONPATH) $(PYTHON) benchmarks/loader.py --out $(OUT)/loader-gpu.json

clean:           ## remove the environment, the demo and all caches
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

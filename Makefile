# `make` alone lists the targets.
PYTHON      ?= python3
VENV        ?= .venv
# Where pip finds torch, if not where it finds everything else (a PyTorch wheel index for your CUDA version or for CPUs).
TORCH_INDEX ?=
DEMO        ?= demo
OUT         ?= benchmarks/results
# Processes that share the tests.
TEST_WORKERS ?= 2
# Of `make gpu`: profiles in order, and the seconds of one call.
PROFILES    ?= contact measure
GPU_SECONDS ?= 600

BIN         := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALLED   := $(VENV)/.installed
FOR_TESTS   := $(VENV)/.installed-for-tests
# FFCV is built from source against these; without them its tests are skipped (and with CI=true refused).
FFCV_NEEDS  := libopencv-dev libturbojpeg0-dev pkg-config g++
HAVE_FFCV   := pkg-config --exists opencv4 libturbojpeg 2>/dev/null

# A cluster of several nodes is started on this machine with these; without them its tests are skipped (with CI=true refused).
SLURM_NEEDS := slurmctld slurmd slurm-client munge iproute2
HAVE_SLURM  := command -v slurmctld slurmd sbatch munged ip >/dev/null

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-docs test-fuzz test-dist test-slurm test-all mutants lint audit docs bench gpu clean

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install everything pinned in constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(FOR_TESTS): $(INSTALLED)
	@echo "installing what the tests need beside that"
	@$(HAVE_FFCV) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FFCV_NEEDS) >/dev/null; }
	@$(HAVE_FFCV) || echo "note: FFCV cannot be built here, its tests will be skipped; install $(FFCV_NEEDS)"
	@$(PIP_INSTALL) -e ".[demo,dev,docs,onnx,remote,parquet,formats,track$$($(HAVE_FFCV) && echo ,ffcv)]"
	@touch $@

demo: $(INSTALLED)  ## real digits -> shards -> FAT-B0 trained: accuracy, batch.png, curves.png in demo/
	@BIN=$(BIN) DEMO=$(DEMO) bash launch/demo.sh

test: lint test-unit test-docs test-fuzz test-dist test-slurm  ## lint, unit tests, documentation, mutated files, several-process tests, a SLURM cluster on this machine

# OpenMP's threads spin while they wait, which costs several processes on two cores most of their time.
test-unit: $(FOR_TESTS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/unit -m "not gpu and not slow and not timed" -n $(TEST_WORKERS) --dist worksteal
	$(BIN)/python -m pytest tests/unit -m "timed and not gpu and not slow"

# Every command and Python example of README and docs, the site, and the language of code and pages.
test-docs: $(FOR_TESTS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/docs tests/language -n $(TEST_WORKERS) --dist worksteal

test-fuzz: $(FOR_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -m "not slow"

test-dist: $(FOR_TESTS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/dist -m "not gpu and not slow and not timed" -n $(TEST_WORKERS) --dist worksteal
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/dist -m "timed and not gpu and not slow"

test-slurm: $(FOR_TESTS) slurm-installed
	OMP_WAIT_POLICY=PASSIVE PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest tests/slurm -m "not gpu and not slow"

.PHONY: slurm-installed
slurm-installed:
	@export PATH=$$PATH:/usr/sbin; $(HAVE_SLURM) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_NEEDS) >/dev/null; }
	@export PATH=$$PATH:/usr/sbin; $(HAVE_SLURM) || echo "note: no SLURM here, its tests will be skipped; install $(SLURM_NEEDS)"

test-all: lint $(FOR_TESTS) slurm-installed  ## every test, the long campaigns too
	OMP_WAIT_POLICY=PASSIVE PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest tests -m "not gpu"

# Not part of `make test-all`: an hour on two cores. FILES="pipeline/plan.py ..." takes some of the files.
mutants: $(FOR_TESTS)  ## mutation testing of the files in tests/mutation/campaign.toml: which changes of code no test notices
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.campaign --workers $(TEST_WORKERS) $(FILES)

lint: $(FOR_TESTS)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# Not part of `make lint`: it needs the network, and a new advisory may fail it without a change here. pip-audit has an
# environment of its own because its dependencies would change pinned versions. --strict: fail if a package is not found.
audit:           ## check the pinned packages for known vulnerabilities
	@$(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install -qq pip-audit
	$(VENV)-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

docs: $(FOR_TESTS)  ## the documentation as a site, in site/
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(FOR_TESTS)  ## all benchmarks on this machine -> benchmarks/results/ (half an hour)
	$(BIN)/python benchmarks/loader.py --out $(OUT)/loader.json
	$(BIN)/python benchmarks/reader.py --out $(OUT)/reader.json
	$(BIN)/python benchmarks/augment.py --out $(OUT)/augment.json
	$(BIN)/python benchmarks/shard.py --out $(OUT)/shard.json
	$(BIN)/python benchmarks/model.py --out $(OUT)/model.json
	$(BIN)/python benchmarks/decode.py --out $(OUT)/decode.json
	$(BIN)/python benchmarks/interpreter_lock.py --out $(OUT)/interpreter_lock.json
	$(BIN)/python benchmarks/step.py --models fat_b0 fat_b1 --modes training --out $(OUT)/step.json

# Needs neither pip nor .venv. PYTHON must have torch, DALI, accelerate, deepspeed, transformers, pydantic,
# annotated-types, tyro, rich, safetensors, simplejpeg, xxhash, filelock, fsspec, scikit-learn, scikit-image, matplotlib,
# psutil and pytest; timm is optional.
# Packages in a folder .kit are unpacked first (docs/performance.md).
gpu:             ## GPU tests and timings (10 minutes; a second call continues): make gpu PYTHON=python3 OUT=dir
	$(PYTHON) benchmarks/gpu.py $(PROFILES) --seconds $(GPU_SECONDS) --out $(OUT)

clean:           ## remove the environment, the demo and all caches
	rm -rf $(VENV) $(VENV)-audit $(DEMO) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make` alone lists the targets.
PYTHON      ?= python3
VENV        ?= .venv
# Additional package index for torch: a PyTorch wheel index for your CUDA version or for CPUs.
TORCH_INDEX ?=
DEMO        ?= demo
OUT         ?= benchmarks/results
# Number of processes that run the tests in parallel.
TEST_WORKERS ?= 2
# For `make soak`: its duration.
MINUTES     ?= 60
# For `make gpu`: the profiles to run in order, and the time limit of one call in seconds.
PROFILES    ?= contact measure
GPU_SECONDS ?= 600

BIN         := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALLED   := $(VENV)/.installed
FOR_TESTS   := $(VENV)/.installed-for-tests
# FFCV is built from source against these packages. Without them its tests are skipped, or fail if CI=true.
FFCV_NEEDS  := libopencv-dev libturbojpeg0-dev pkg-config g++
HAVE_FFCV   := pkg-config --exists opencv4 libturbojpeg 2>/dev/null
# The tests of `pipeline report` open its page in this browser. Without it they are skipped, or fail if CI=true.
BROWSER     := chromium chromium-driver
HAVE_BROWSER := command -v chromium chromedriver >/dev/null

# The SLURM tests start a cluster and SSH servers on this machine with these packages. Without them they are skipped, or fail if CI=true.
SLURM_NEEDS := slurmctld slurmd slurm-client munge iproute2 openssh-server openssh-client
HAVE_SLURM  := command -v slurmctld slurmd sbatch munged ip sshd ssh >/dev/null

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-dist test-timed test-slurm test-all mutants style lint soak audit docs peers bench gpu clean

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv and install the versions pinned in constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; specify a newer one, as in: make PYTHON=python3.12 ..."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "error: $(PYTHON) cannot create a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[demo]'
	@touch $@

# trackio has a folder of its own, because no version of it allows the pinned version of Pillow, so that pip would report
# a conflict whenever it installs another package. So have timm, torchvision and segmentation_models_pytorch
# (tests/support/vision_libraries.py); --no-deps, because their dependencies are installed already, except for a CUDA torch.
$(FOR_TESTS): $(INSTALLED)
	@echo "installing the additional packages for the tests"
	@$(HAVE_FFCV) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FFCV_NEEDS) >/dev/null; }
	@$(HAVE_FFCV) || echo "note: FFCV cannot be built and its tests will be skipped; to run them, install $(FFCV_NEEDS)"
	@$(HAVE_BROWSER) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER) >/dev/null; }
	@$(HAVE_BROWSER) || echo "note: Chromium is missing and tests of reports will be skipped; to run them, install $(BROWSER)"
	@$(PIP_INSTALL) -e ".[demo,dev,docs,onnx,remote,parquet,formats,tensorboard,wandb,mlflow$$($(HAVE_FFCV) && echo ,ffcv)]"
	@$(PIP_INSTALL) --upgrade --no-deps --target $(VENV)/trackio trackio gradio_client orjson
	@$(PIP_INSTALL) --upgrade --no-deps --target $(VENV)/vision timm torchvision segmentation-models-pytorch
	@$(BIN)/python -m tests.support.torchvision_nms $(VENV)/vision
	@touch $@

demo: $(INSTALLED)  ## convert real digits and train FAT-B0: accuracy, batch.png and report.html in demo/
	@BIN=$(BIN) DEMO=$(DEMO) bash launch/demo.sh

test: style test-unit test-dist test-timed test-slurm  ## ruff, mypy, unit tests, documentation, fuzzing, distributed tests, SLURM cluster on this machine

NOT_SLOW = and not slow

# Also mypy, every command and Python example of README and docs, the site, the language of code and pages, and fuzzing.
# OpenMP threads spin while they wait, which would slow down several processes on few cores.
test-unit: $(FOR_TESTS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/unit tests/docs tests/language tests/fuzz -m "not gpu and not timed $(NOT_SLOW)" -n $(TEST_WORKERS) --dist worksteal

test-dist: $(FOR_TESTS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/dist -m "not gpu and not timed $(NOT_SLOW)" -n $(TEST_WORKERS) --dist worksteal

# Only their files, because collecting all others takes longer than the tests.
test-timed: $(FOR_TESTS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $$(grep -rlF mark.timed tests --include=*.py) -m "timed and not gpu $(NOT_SLOW)"

test-slurm: $(FOR_TESTS) slurm-installed
	OMP_WAIT_POLICY=PASSIVE PATH=$$PATH:/usr/sbin $(BIN)/python -m pytest tests/slurm -m "not gpu $(NOT_SLOW)"

.PHONY: slurm-installed
slurm-installed:
	@export PATH=$$PATH:/usr/sbin; $(HAVE_SLURM) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_NEEDS) >/dev/null; }
	@export PATH=$$PATH:/usr/sbin; $(HAVE_SLURM) || echo "note: SLURM is missing and its tests will be skipped; to run them, install $(SLURM_NEEDS)"

test-all: NOT_SLOW =
test-all: test   ## all tests, including the slow ones

# Not part of `make test-all`, because it takes an hour on two cores. FILES="pipeline/plan.py ..." selects files.
mutants: $(FOR_TESTS)  ## mutation testing of the files in tests/mutation/campaign.toml: find code changes that no test detects
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.campaign --workers $(TEST_WORKERS) $(FILES)

# Not part of `make test-all` either, which has a short one. As root, for network namespaces and mounts (docs/soak.md).
soak: $(FOR_TESTS)  ## train through random failures for an hour -> benchmarks/results/soak.json: make soak MINUTES=60
	PATH=$$PATH:/usr/sbin $(BIN)/python -m tests.soak --minutes $(MINUTES) --json $(OUT)/soak.json

style: $(FOR_TESTS)
	$(BIN)/ruff check .

lint: style      ## ruff and mypy
	$(BIN)/mypy

# Not part of `make lint`, because it needs the network and a new advisory can make it fail without a code change. pip-audit
# has its own environment, because its dependencies would change pinned versions. --strict: fail if a package is not found.
audit:           ## check the pinned packages for known vulnerabilities
	@$(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install -qq pip-audit
	$(VENV)-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

docs: $(FOR_TESTS)  ## the documentation as a site, in site/
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# --no-deps, because mosaicml-streaming allows neither the pinned NumPy nor the pinned transformers. These packages, and
# those of `make test`, are all that the loaders import. SPDL decodes with the system's FFmpeg (apt: ffmpeg).
PEERS := mosaicml-streaming litdata spdl spdl-core spdl-io grain array-record etils portpicker cloudpickle obstore \
	Brotli zstd python-snappy cramjam catalogue
peers: $(FOR_TESTS)  ## install the loaders of other projects, which benchmarks/loader.py compares with ours
	@$(PIP_INSTALL) --upgrade --no-deps --target $(VENV)/peers $(PEERS)

bench: $(FOR_TESTS)  ## all benchmarks on this machine -> benchmarks/results/ (half an hour)
	$(BIN)/python benchmarks/loader.py --out $(OUT)/loader.json
	$(BIN)/python benchmarks/reader.py --out $(OUT)/reader.json
	$(BIN)/python benchmarks/augment.py --out $(OUT)/augment.json
	$(BIN)/python benchmarks/shard.py --out $(OUT)/shard.json
	$(BIN)/python benchmarks/model.py --out $(OUT)/model.json
	$(BIN)/python benchmarks/decode.py --out $(OUT)/decode.json
	$(BIN)/python benchmarks/interpreter_lock.py --out $(OUT)/interpreter_lock.json
	$(BIN)/python benchmarks/slow_ranks.py --out $(OUT)/slow_ranks.json
	$(BIN)/python benchmarks/step.py --models fat_b0 fat_b1 --modes training --out $(OUT)/step.json

# Uses neither pip nor .venv. PYTHON must have torch, DALI, accelerate, deepspeed, transformers, pydantic,
# annotated-types, tyro, rich, safetensors, simplejpeg, xxhash, filelock, fsspec, scikit-learn, scikit-image, matplotlib,
# psutil and pytest; timm is optional.
# Packages in a folder .kit are unpacked first (benchmarks/gpu.py).
gpu:             ## GPU tests and timings (10 minutes; call again to continue): make gpu PYTHON=python3 OUT=dir
	$(PYTHON) benchmarks/gpu.py $(PROFILES) --seconds $(GPU_SECONDS) --out $(OUT)

clean:           ## remove the environments, the demo and all caches
	rm -rf $(VENV) $(VENV)-audit $(DEMO) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

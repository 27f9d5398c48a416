# SPDX-License-Identifier: Apache-2.0
# make demo [METHOD=mae] [PROCESSES=2] | test | bench | methods | gpu | lint | wheel | info | clean. Everything runs in .venv, which is made when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL := build/wheel
# wheel: the torch releases beside which it is checked, and the newest Python of the machine, to check it with another
TORCHES ?= 2.11.0 2.13.0
PYTHONS = $(wildcard $(foreach minor,0 1 2 3 4,/usr/bin/python3.1$(minor) $(HOME)/.pyenv/versions/3.1$(minor).*/bin/python3.1$(minor)))
OTHER_PYTHON ?= $(lastword $(PYTHON) $(PYTHONS))
# A developer's build leaves out some of the release's GPUs, for time: what nvcc makes for these three is tested.
export SSLKERNELS_CUDA_ARCHITECTURES ?= 80,90,100
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test bench methods gpu lint wheel info clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built $(VENV)/.demo
	$(BIN)/$(if $(PROCESSES),torchrun --standalone --nproc_per_node $(PROCESSES),python) -m sslkernels.demo $(if $(METHOD),--method $(METHOD)) $(ARGS)

# One thread: on few or busy cores, threads that wait for each other cost minutes. Tests that are about threads set them.
test wheel: export OMP_NUM_THREADS ?= 1
test wheel: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/.built $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

bench: $(VENV)/.built $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m benchmarks $(ARGS)

# every method for a minute on real data; ARGS=--docs puts the table into docs/methods.md
methods: $(VENV)/.built $(VENV)/.demo
	$(BIN)/python -m benchmarks.methods $(ARGS)

# With $(PYTHON) as it is: its torch must have CUDA, which .venv's has not. Needs nvcc, pytest and hypothesis.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.run $(VENV)/.demo $(VENV)/.test $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

info: $(VENV)/.built
	$(BIN)/python -m sslkernels info

# The release (docs/release.md): sdist and wheel in dist/, checked beside each of $(TORCHES), several GB to download.
# CUDA_HOME names a toolkit; otherwise the one in requirements-nvcc.txt is fetched.
wheel: export SSLKERNELS_CPU := 1
wheel: export SSLKERNELS_CUDA := 1
wheel: export SSLKERNELS_WERROR := 1
wheel: export SSLKERNELS_GLIBC := 2.28
wheel: export SSLKERNELS_CUDA_ARCHITECTURES :=
wheel: export CUDA_HOME ?= $(CURDIR)/build/toolkit/nvidia/cu13
wheel: $(VENV)/.run $(VENV)/.wheel $(if $(CUDA_HOME),,build/toolkit/.done)
	rm -rf dist $(WHEEL)
	$(BIN)/python -m build --no-isolation --outdir $(WHEEL) .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist $(WHEEL)/*.whl
	mv $(WHEEL)/*.tar.gz dist
	! $(BIN)/python -m zipfile --list dist/*.whl | grep '\.libs/'  # nothing is bundled
	$(BIN)/twine check --strict dist/*
	$(if $(TORCHES),$(MAKE) $(TORCHES:%=$(WHEEL)/torch-%))
	ls -l dist

# From outside the source tree, with no compiler on PATH (inductor needs one); the first torch meets another Python.
$(WHEEL)/torch-%:
	$(if $(filter $*,$(firstword $(TORCHES))),$(OTHER_PYTHON),$(PYTHON)) -m venv $@
	grep -E '^(pytest|hypothesis)=' requirements-test.txt > $(WHEEL)/requirements.txt
	$@/bin/python -m pip install --quiet torch==$* -r $(WHEEL)/requirements.txt dist/*.whl
	cd $@ && PATH="$(abspath $@/bin)" CXX= python -m sslkernels info
	cd $@ && $(abspath $@/bin/python) -c "import torch; from sslkernels._library import PROBLEMS as p; assert not p or not torch.version.cuda and 'cpu' not in p, p"
	cd $@ && PATH="$(abspath $@/bin)" CXX= python -m pytest -c ../../../pyproject.toml --rootdir ../../.. -p no:cacheprovider -k "not inductor" ../../../tests/ops $(ARGS)

build/toolkit/.done: requirements-nvcc.txt
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) -r $<
	ln -s lib $(@D)/nvidia/cu13/lib64  # where nvcc looks
	touch $@

clean:
	rm -rf build dist *.egg-info sslkernels/lib .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks $(VENV)/.built
	find sslkernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# requirements.txt is a set of its own; the others have a stamp each
$(VENV)/.run: requirements.txt | $(BIN)/python
	$(PIP) install --quiet -r $<
	touch $@

$(VENV)/.demo: requirements-demo.txt requirements-speech.txt | $(VENV)/.run
	$(PIP) install --quiet -r requirements-demo.txt
	$(PIP) install --quiet --no-deps -r requirements-speech.txt
	touch $@

$(VENV)/.%: requirements-%.txt | $(VENV)/.run
	$(PIP) install --quiet -r $<
	touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.run
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

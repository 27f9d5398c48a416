# SPDX-License-Identifier: Apache-2.0
# make demo [METHOD=mae] | test | bench | methods | gpu | lint | compat | info | clean. Everything runs in .venv, which is made when it is missing.
PYTHON ?= python3
# compat: another Python than the one that builds the wheel, if the machine has one
COMPAT_PYTHON ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
COMPAT := build/compat
# A developer's build leaves out some of the release's GPUs, for time: what nvcc makes for these three is tested.
export SSLKERNELS_CUDA_ARCHITECTURES ?= 80,90,100
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test bench methods gpu lint compat info clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built $(VENV)/.demo
	$(BIN)/python -m sslkernels.demo $(if $(METHOD),--method $(METHOD)) $(ARGS)

# One thread: on few or busy cores, threads that wait for each other cost minutes. Tests that are about threads set them.
test compat: export OMP_NUM_THREADS ?= 1
test compat: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/.built $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

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

# One wheel, built here, must serve another torch: 2.11.0, whose PyPI build is the CUDA one (several GB to download).
compat: $(VENV)/.built $(VENV)/.demo $(VENV)/.test
	rm -rf $(COMPAT)
	SSLKERNELS_CPU=1 SSLKERNELS_CUDA=1 $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir $(COMPAT) .
	$(COMPAT_PYTHON) -m venv $(COMPAT)/venv
	$(COMPAT)/venv/bin/python -m pip install --quiet torch==2.11.0 -r requirements-demo.txt -r requirements-test.txt $(COMPAT)/*.whl
	$(COMPAT)/venv/bin/python -m pip install --quiet --no-deps -r requirements-speech.txt
	cd $(COMPAT) && venv/bin/python -m sslkernels info
	cd $(COMPAT) && venv/bin/python -c "from sslkernels import _library as l, info; assert not l.PROBLEMS, l.PROBLEMS; assert info.serves('ema_update_', 'cuda') == 'compiled'"
	cd $(COMPAT) && venv/bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider ../../tests/ops ../../tests/losses $(ARGS)

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

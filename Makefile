PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions of everything, direct or not, that the environment in VENV is made of; make lock writes it.
LOCK := locks/tested.txt
# By variables, since an editable install's build has an environment of its own, to which options do not reach: pip before
# 25.3 holds that to PIP_CONSTRAINT, pip from there on to PIP_BUILD_CONSTRAINT.
PIP := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all test-oldest test-latest test-gpu gpu-first check lock kernels sanitize bench bench-gpu clean

# Quantizes the bundled model both ways, measures, and lets each tell a story.
demo: $(VENV)/installed
	@mkdir -p build
	$(BIN)/qcli quantize examples/demo-model --bits 4 --output build/demo-nf4 --overwrite
	$(BIN)/qcli quantize examples/demo-model --bits 8 --output build/demo-int8 --overwrite
	$(BIN)/qcli generate build/demo-nf4 "Once upon a time"
	$(BIN)/qcli generate build/demo-int8 "Once upon a time"

# Files as they lie: sorted by their number of tests, the emulator's few long ones would come last, on one core.
test: $(VENV)/tested
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# With those that take minutes or gigabytes: every case of every kernel through the PTX interpreter, where nvcc is.
test-all: $(VENV)/tested
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

# On a machine with an NVIDIA GPU, in the Python whose torch knows it, with PyCUDA, pytest and bitsandbytes. ARGS="-k parity"
# runs a part, ARGS="-m slow -k memcheck" (racecheck, synccheck, initcheck) a tool of compute-sanitizer, some minutes each.
test-gpu:
	$(PYTHON) -m pytest -q -m "not slow" tests/gpu tests/test_decode_cuda.py $(ARGS)

# On a GPU that is lent for half an hour: the proofs and figures in the order of their worth, up to the first wrong number.
# ARGS="--minutes 9" ends in time, ARGS="--from STEP" goes on; logs and summary.json lie in build/gpu-first.
gpu-first:
	$(PYTHON) benchmarks/gpu_first.py $(ARGS)

check: $(VENV)/checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the tables of options in docs/ from the commands.
.PHONY: docs
docs: $(VENV)/installed
	$(BIN)/python docs/options.py

# Builds the CPU kernels in place, for work on them in a checkout, and where nvcc is on PATH those for CUDA.
kernels:
	cmake -S kernels -B build/kernels -DCMAKE_INSTALL_PREFIX=$(CURDIR) -DQCLI_FATBIN=$(if $(shell command -v nvcc 2>/dev/null),ON,OFF)
	cmake --build build/kernels
	cmake --install build/kernels

# The tests of the ops on kernels built with AddressSanitizer and UBSan.
sanitize: $(VENV)/tested
	cmake -S kernels -B build/sanitize -DQCLI_SANITIZE=ON
	cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	QCLI_CPU_LIBRARY=build/sanitize/libqcli_cpu.so $(BIN)/python -m pytest -q tests/ops

# ARGS="--folder FOLDER" keeps the checkpoints that it makes (12 GB), ARGS="--llama-cpp PYTHON" puts llama.cpp beside qcli.
bench: $(VENV)/tested
	$(BIN)/python benchmarks/cpu.py $(ARGS)

# Where test-gpu runs. ARGS="--folder FOLDER" keeps the checkpoint that it makes (13 GB), ARGS="--only nf4" runs a part.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# One step for torch and the rest: pip then takes the locked torch, of whatever build it is offered.
$(VENV)/installed: pyproject.toml $(LOCK) $(wildcard kernels/*.txt kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e .
	@cp $(LOCK) $@  # what it was made of, for tests/test_lock.py

$(VENV)/tested: $(VENV)/installed
	$(PIP) install -q -e ".[test]"
	@touch $@

$(VENV)/checked: $(VENV)/installed
	$(PIP) install -q -e ".[dev]"
	@touch $@

# The suite in the oldest versions that pyproject.toml admits, and in the newest. Of torch the newest is the locked one, since a
# newer one may be gigabytes of CUDA packages: TORCH=torch takes it all the same, TORCH=torch==2.14.1 that one.
TORCH = $(shell grep -o '^torch==[0-9.]*' locks/tested.txt)
test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCK=locks/oldest.txt
test-latest:
	rm -rf .venv-latest
	@mkdir -p build
	echo "$(TORCH)" > build/latest.txt
	$(MAKE) test VENV=.venv-latest LOCK=build/latest.txt

# Resolves the lock files again. What they hold stays, where pyproject.toml still admits it; ARGS=--upgrade takes the newest.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install -q uv
	$(RESOLVE) --resolution highest -o locks/tested.txt $(ARGS)
	$(RESOLVE) --resolution lowest-direct -o locks/oldest.txt $(ARGS)
RESOLVE := build/uv/bin/uv pip compile -q pyproject.toml --group build --extra test --extra dev --universal --python-version 3.11 \
	--annotation-style line --custom-compile-command "make lock"

clean:
	rm -rf build dist $(VENV) .venv-oldest .venv-latest .pytest_cache .ruff_cache .hypothesis

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all test-gpu gpu-first check kernels sanitize bench bench-gpu clean

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

# Installed with the torch of constraints.txt first: without the pin pip may bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard kernels/*.txt kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/checked: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist $(VENV) .pytest_cache .ruff_cache .hypothesis

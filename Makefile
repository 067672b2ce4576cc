# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles the files that are imported, when they are; all of them at once take four times as long to
# compile as to unpack.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)

OUT ?= build/gpu-check/out

# Where this is set, every process of the tests compiles all that it imports anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test lint format build bench sanitize spills sass gpu-check gpu-record clean

demo: $(VENV)/installed
	$(BIN)/igpt-fast demo --out demo

# As many processes as processors, eight at most: most tests, and all of the kernels' bench, have one thread. Threads that
# wait asleep: on a busy machine spinning ones cost more than they give.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed
	$(BIN)/pytest tests --numprocesses logical --maxprocesses 8 --dist worksteal
	$(BIN)/pytest benchmarks --benchmark-only --quick

lint: $(VENV)/dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pytest tests/test_layout.py

format: $(VENV)/dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Every comparison, then the tables of them: docs/benchmarks.md, summed up in the README.
bench: $(VENV)/installed
	$(BIN)/pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.report --write

# Rebuilds the extension in the tree (the install is editable); what has not changed is not compiled again.
build: $(VENV)/installed

# The op tests of the CPU backend and of the CUDA kernels on the bench under the address and undefined-behaviour sanitizers,
# and a race check of those kernels; builds of their own.
sanitize: $(VENV)/dependencies
	sh tests/sanitize.sh $(BIN)

# What nvcc made of each kernel's main loop, beside what its head promises. Needs nvcc, no GPU; the disassembler comes from
# pip, on demand and apart from .venv.
CUDA_TOOLS := nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
sass: $(VENV)/dependencies
	test -x build/cuda-tools/nvidia/cu13/bin/cuobjdump || $(PIP) --no-deps --target build/cuda-tools $(CUDA_TOOLS)
	$(BIN)/python tests/sass.py build/cuda-tools/nvidia/cu13/bin

# On a machine with a GPU, without .venv and without a network: build, all tests of the CUDA kernels, compute-sanitizer,
# benchmarks, inside nine minutes. PART=build|tests|layouts|sanitizer|rates|benchmarks runs one part.
gpu-check:
	PYTHONPATH="tests:$$PYTHONPATH" $(PYTHON) -m gpu.check --out "$(OUT)" $(if $(PART),--part $(PART))

# Keeps what a gpu-check of these very sources found: which kernels hardware agreed with, and the benchmarks.
gpu-record:
	PYTHONPATH=tests $(PYTHON) -m gpu.report --record "$(OUT)"

# Registers, shared memory and spills of every CUDA kernel; fails on a spill.
spills:
	sh tests/spills.sh

clean:
	rm -rf $(VENV) build demo igpt_fast/_C*.so *.egg-info

$(VENV)/dependencies: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r constraints.txt
	touch $@

# Without build isolation: the pinned cmake and ninja stay where they are, and the next build is incremental.
$(VENV)/installed: $(VENV)/dependencies pyproject.toml setup.py CMakeLists.txt $(CPP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

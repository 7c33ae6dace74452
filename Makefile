# Everything a newcomer needs is two words: `make demo`, `make test`. They make their own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Without it pip takes the newest torch; the file pins the one that the tests run on.
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help env demo test soak sanitize lint format bench bench-generate bench-train cuda wheel-check clean

help:  ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/* kernels/*/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[book,triton,test,dev]'
	@touch $@

env: $(READY)  ## make .venv with everything in it, and build the extension

demo: $(READY)  ## train a small GPT, plot it, generate with the KV cache, compare speed with plain PyTorch
	$(BIN)/python -m fastgpt demo

test: $(READY)  ## run all tests
	$(BIN)/python -m pytest

soak: $(READY)  ## 2,000 random cases of generation against the book's loop, and 200,000 tokens without growth of memory
	$(BIN)/python tests/equality.py 2000
	$(BIN)/python tests/soak.py 200000

sanitize: $(READY)  ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer (about 15 minutes)
	$(BIN)/python tools/sanitize.py

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: $(READY)  ## time every op and the model against plain PyTorch (pytest-benchmark)
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-generate: $(READY)  ## race generation against transformers, CTranslate2 and llama.cpp, as far as they are installed
	$(BIN)/python -m benchmarks.generate

bench-train: $(READY)  ## GPT-2 124M training steps against every way PyTorch has on a CPU (about 20 minutes)
	$(BIN)/python -m benchmarks.train

cuda: $(READY)  ## compile all CUDA C++ (needs nvcc, no GPU) and list registers and spills
	$(PIP) install -q 'setuptools>=77' pybind11 ninja
	FASTGPT_BUILD_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda-check --build-temp build/cuda-check/temp
	@cat build/cuda-check/temp/cuda/*.log | $(BIN)/python tools/ptxas_table.py

wheel-check: $(READY)  ## sdist, wheel from it, install in an empty environment, use it from another folder
	$(BIN)/python tools/wheel_check.py

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastgpt/_*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

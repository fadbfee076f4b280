# make demo    install into .venv and train microgpt on the built-in names
# make test    the tests, on a fresh machine too
# make lint    ruff, formatting, type checks
# make format  let ruff put the formatting right

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/tapeless train

test: $(VENV)/.tested
	$(BIN)/pytest

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.linted
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/microgpt.py

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'tapeless needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

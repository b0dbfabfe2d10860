# Two commands for a fresh machine with Python 3.10 or later: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: .venv/core.done  ## unlearn two topics from the built-in model, measure, write a report
	$(BIN)/lethe demo

test: .venv/dev.done  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev.done  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error src

docs: .venv/dev.done  ## the generated pages
	$(BIN)/python docs/make_index.py

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/core.done: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/dev.done: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@ .venv/core.done

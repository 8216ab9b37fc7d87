# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs wheel clean

demo: .venv/.demo
	$(BIN)/python docs/examples/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

wheel: .venv/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv dist docs/_build

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group demo
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

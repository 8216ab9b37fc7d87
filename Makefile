# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: the tests often wait for a server or for another process.
TEST_WORKERS := $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

# Compiled modules are kept, whatever the shell says: the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-web test test-long test-release coverage oldest newest pythons lint docs bench \
	wheel mutants checklist clean

demo: .venv/.demo
	$(BIN)/python docs/examples/demo.py

demo-web: .venv/.demo-web
	cd docs/examples && $(abspath $(BIN))/python -m webapp $(DEMO_ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-long: .venv/.dev
	LUCENT_TEST_LONG=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m long \
		$(PYTEST_ARGS)

test-release: .venv/.dev
	$(BIN)/python -m pytest -m release $(PYTEST_ARGS)

coverage: .venv/.dev
	$(MAKE) test PYTEST_ARGS=--cov

oldest:
	.ci/oldest

newest: .venv/.dev
	$(BIN)/python .ci/newest_postgresql.py

pythons: wheel
	.ci/pythons

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: .venv/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

bench: .venv/.bench
	$(BIN)/python -m tests.bench

# The time of the last commit stands in the archives, so that the same commit gives the same bytes.
wheel: .venv/.dev
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} \
		$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

mutants: .venv/.dev
	$(BIN)/python .ci/mutants.py

checklist: .venv/.dev
	$(BIN)/python .ci/release.py

clean:
	rm -rf .venv dist docs/_build mutants

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group demo
	touch $@

.venv/.demo-web: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group demo-web
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

.venv/.bench: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable . --group bench
	touch $@

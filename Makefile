# Every target sets up what it needs by itself: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check slow bench docs clean

demo: $(READY)  ## set up, and let the embedded model tell stories beyond its trained length
	$(BIN)/streamllm run --endless --max-tokens 1500 --seed 7 --stats "Once upon a time"

test: check  ## everything that CI runs
	$(BIN)/python -m pytest --cov --cov-report=term -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(READY)  ## the long tests that CI leaves out
	$(BIN)/python -m pytest -m slow

bench: $(READY)  ## speed and memory; writes docs/results/
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/endless.py --threads 1
	$(BIN)/python benchmarks/pipe.py --threads 1
	$(BIN)/python benchmarks/speed.py

docs: $(READY)  ## tables that are made from the tests
	$(BIN)/python -m pytest -q tests/test_laws.py --families-table docs/families.md

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("streamllm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

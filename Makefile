# Two commands from a clone: `make demo` and `make test`. Each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test files at a time, each on one thread: most of a test's time goes into starting processes.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all lint clean

demo: $(READY)
	$(BIN)/python -m locfast.train --method maskembed --overwrite

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check
	$(BIN)/python benchmarks/compute_claim.py --check

# Torch and the build tools first: locfast is then built against that torch, not against a second one in isolation.
$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "locfast needs Python 3.11 or newer, found $$($(PYTHON) --version): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "scikit-build-core>=0.11" "cmake>=3.24" ninja "torch>=2.10"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

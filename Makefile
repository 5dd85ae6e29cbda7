# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
JOBS   ?= 2
BENCHES = balance rebalance

export OMP_NUM_THREADS = 1
export HYDRA_FULL_ERROR = 0

.PHONY: demo test soak mutants check bench mooncake clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not gpu"

soak: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=900

mutants: $(READY)
	$(BIN)/python tests/mutants.py --jobs $(JOBS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	@for name in $(BENCHES); do $(BIN)/python launch/bench.py bench=$$name || exit 1; done

mooncake: $(READY)
	@ldconfig -p | grep -q librdmacm.so.1 && ldconfig -p | grep -q libibverbs.so.1 && ldconfig -p | grep -q libnuma.so.1 || \
	  { apt-get update -qq && apt-get install -y -qq libibverbs1 librdmacm1 libnuma1; } || \
	  { echo "Mooncake loads libibverbs1, librdmacm1 and libnuma1: install these packages, then make mooncake again"; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e ".[mooncake]"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "elastic_moe needs Python 3.11 or newer with venv (Debian: apt-get install python3 python3-venv);" \
	         "choose one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

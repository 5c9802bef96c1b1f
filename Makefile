# `make demo`: from raw text to a trained model that transformers loads, in minutes, on any machine.
# `make test`: everything that a change must pass, on all cores. `.venv/bin/pytest -m long` is the rest, at length.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/tests-installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

# requirements.txt pins what was tested; -e makes `import lit_gpt` this source tree. Without --no-compile pip spends two
# thirds of its time on byte code that is never imported; Python compiles and keeps the rest when it is first needed.
export PYTHONDONTWRITEBYTECODE =

.venv/installed: requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --no-compile -r requirements.txt
	$(BIN)/pip install --no-deps --no-build-isolation -e . > .venv/install.log 2>&1 || { cat .venv/install.log; exit 1; }
	touch $@

.venv/tests-installed: requirements-test.txt .venv/installed
	$(BIN)/pip install --no-compile --quiet -r requirements-test.txt
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install --no-compile --quiet triton==3.6.0 || echo 'no triton: its tests skip'
	touch $@

clean:
	rm -rf .venv out/demo data/demo

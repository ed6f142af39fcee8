# `make test` and `make demo` start from nothing but Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

OLDEST := .venv-oldest

.PHONY: demo test slow oldest lint typecheck world clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)          ## the main job on the embedded models
	$(BIN)/unified-edit demo

test: $(READY)          ## the default tests
	$(BIN)/python -m pytest

slow: $(READY)          ## the tests that start many processes or read thousands of files
	$(BIN)/python -m pytest -m slow

$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints.txt --editable '.[datasets,lora,plots]' \
		accelerate hypothesis pytest pytest-xdist transformers==5.0.0
	touch $@

oldest: $(OLDEST)/.ready ## every family on the oldest transformers supported
	$(OLDEST)/bin/python -m pytest tests/test_conformance.py \
		tests/test_conformance_files.py tests/test_target_families.py \
		tests/test_adapter.py tests/test_engine.py tests/test_wrapped.py \
		tests/test_tracing.py tests/test_gradients.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(READY)
	$(BIN)/mypy

world: $(READY)         ## trains the embedded models and editors anew (two hours on two cores)
	$(BIN)/python examples/tinyworld/world.py
	$(BIN)/python examples/tinyworld/train.py gpt2
	$(BIN)/python examples/tinyworld/train.py llama
	$(BIN)/python examples/tinyworld/report.py --write
	$(BIN)/python examples/tinyworld/train_mend.py gpt2
	$(BIN)/python examples/tinyworld/train_mend.py llama

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo_output *.egg-info .mypy_cache .pytest_cache .ruff_cache

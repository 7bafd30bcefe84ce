# What people do with a checkout. Everything lives in .venv, which changes only when the pins do.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

MODEL  ?= demo/model
PORT   ?= 8000
ARGS   ?=
DEMO   := $(if $(filter demo/model,$(MODEL)),--served-model-name demo --adapters adapters)

.PHONY: serve test check format clean

serve: $(VENV)/.serve  ## serve the bundled demo, or MODEL=<folder or hub id> [PORT=8000] [ARGS="--adapter-slots 8 ..."]
	$(BIN)/lora-serve serve $(MODEL) --port $(PORT) $(DEMO) $(ARGS)

test: $(VENV)/.dev  ## all tests, or ARGS="tests/engine -k drain"
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.dev  ## style, types, and the walls of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: requirements/serve.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/serve.txt -e .
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.serve
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	touch $@

# What a user types. Everything is installed into .venv from the pins in constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help install demo test test-gpu test-nightly lint types check clean
help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; say which Python to use: make PYTHON=python3 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $$(grep -E '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	@rm -f $(VENV)/.installed-* && touch $(STAMP)

install: $(STAMP) ## install etude and its development tools into .venv

demo: $(STAMP)   ## fine-tune Gemma 3 270M on the bundled task, here, now
	$(BIN)/etude demo

test: $(STAMP)   ## the tests
	$(BIN)/python -m pytest -n 2 -m 'not gpu and not nightly'

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-nightly: $(STAMP) ## the whole reliability plan
	$(BIN)/python -m pytest -n 2 -m 'nightly'

lint: $(STAMP)   ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## strict types over src/
	$(BIN)/mypy

check: lint types test ## everything CI runs

clean:           ## remove what was installed and built
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

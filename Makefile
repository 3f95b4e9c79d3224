# quickstart: the main job    test, lint, types: the checks    all: the three checks
# Every word builds .venv first if it is missing or out of date. PYTHON=... chooses the interpreter.
SHELL  := /bin/sh
PYTHON ?= python3
BIN    := .venv/bin

.PHONY: quickstart test lint types all install

all: test lint types

install: .venv/.installed

# The stamp is newer than what decides the environment, so a second make does not install again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) scripts/preflight.py install
	@echo "posttrain: installing into .venv (some gigabytes the first time) ..."
	@start=$$(date +%s); \
	{ [ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; } && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[dev,interpreter]' && \
	touch $@ && \
	echo "posttrain: installed in $$(( $$(date +%s) - start )) s"

quickstart: .venv/.installed
	@$(BIN)/python scripts/preflight.py run
	@start=$$(date +%s); \
	$(BIN)/posttrain run quickstart && \
	echo "posttrain: ran in $$(( $$(date +%s) - start )) s"

test: .venv/.installed
	@$(BIN)/python scripts/preflight.py run
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/pyright

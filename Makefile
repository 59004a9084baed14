# make train   train a small GPT on text that every Python brings along
# make test    run the tests
# make check   lint, format and types
# make clean   remove what the others made; runs/ stays
#
# Everything is installed into .venv by the first command that needs it, and again only after pyproject.toml or constraints.txt changed.
# Another interpreter: make PYTHON=/path/to/python3.12 train

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
WORKDIR ?= runs/stdlib_tiny
# Test processes at a time: most of a test is compiling, which keeps one core busy.
WORKERS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test check format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

train: .venv/installed-run
	$(BIN)/python -m gptjax train --config=configs/stdlib_tiny.py --workdir=$(WORKDIR)

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find gptjax tests configs experiments launch -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "gptjax needs Python 3.11 or newer with its venv module, and none was found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gptjax needs Python 3.11 or newer, and $(PYTHON) is not that; name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv

.venv/installed-run: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[plot]'
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[test]'
	@touch $@ .venv/installed-run

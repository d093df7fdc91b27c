# make dev | demo | test | lint | fmt | type | bench | docs. Everything runs in .venv, which is made first where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: dev demo test lint fmt type bench docs clean

# torch comes first and the project is built without isolation: isolated, the build would fetch torch a second time.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,bench,dali]"
	touch $@

dev: $(READY)

demo: $(READY)
	$(BIN)/python -m ddfast demo --out ./demo-out

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

type: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench all

# The site reads its pages from docs/ and its tables from bench/results/; a warning is a failure.
docs: $(READY)
	test -x $(BIN)/mkdocs || $(BIN)/pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.29"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info ddfast/*.so demo-out

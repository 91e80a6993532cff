# Every target sets itself up in .venv: a clone, Python and make are all that is needed.
#
#   make test TORCH='torch==2.11.0'    another torch, in place of the pinned CPU build
#   make test PYTHON=python3.13        another interpreter

PYTHON ?= python3
TORCH ?=
OUT ?=

VENV := .venv
BIN := $(VENV)/bin
KEY := $(VENV)/key
CONSTRAINTS := $(VENV)/constraints.txt
PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
# In the order of their names: files of few tests start processes, and pytest-xdist would leave those to the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DELETE_ON_ERROR:
.PHONY: help demo test test-all docs lint format types package bench bench-gpu clean FORCE

help:
	@echo 'make demo      compare three optimizers on a small transformer, write one HTML page'
	@echo 'make test      the tests; `make test-all` adds the slow ones'
	@echo 'make docs      the documentation, into build/docs; its examples are run, its links checked'
	@echo 'make lint      ruff check and format --check, figures of the documents; `make format` applies both'
	@echo 'make types     mypy'
	@echo 'make package   build wheel and sdist, install the wheel elsewhere and take a step with it'
	@echo 'make bench     time the optimizer step on GPT-2 124M shapes (about 15 minutes, 10 GB of memory)'
	@echo 'make bench-gpu on a machine with a GPU: the tests that need one, then the time of steps, with TORCH=a CUDA build'
	@echo 'make clean     remove .venv and caches'

demo: $(VENV)/compare
	$(BIN)/sharpwise demo $(if $(OUT),--out $(OUT))
	@echo 'In this clone the command is $(BIN)/sharpwise.'

test: $(VENV)/dev
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/dev
	$(PYTEST)

# Warnings are errors. -E: what the pages say depends on the code, which Sphinx does not follow.
docs: $(VENV)/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -EWnq --keep-going -b html -d build/doctrees docs build/docs
	@echo 'Open build/docs/index.html.'

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python benchmarks/figures.py

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/dev
	$(BIN)/mypy

package: $(VENV)/dev
	.ci/package $(BIN)/python

bench: $(VENV)/dev
	$(BIN)/python benchmarks/step_time.py

# Times of kernels that are wrong are worth nothing: the tests come first.
bench-gpu: $(VENV)/dev
	@$(BIN)/python benchmarks/step_time.py --device cuda --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/step_time.py --device cuda

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is built anew when the interpreter or TORCH changes; `key` is written only then, so that the two
# stamps below stay valid otherwise.
$(KEY): FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sharpwise needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: make ... PYTHON=python3.12" >&2; exit 1; }
	@key="$$($(PYTHON) -c 'import sys; print(*sys.version_info[:3], sys.base_prefix)') $(TORCH)"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$key" ]; then \
	  echo 'Setting up $(VENV), once; this takes some minutes.'; \
	  rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && echo "$$key" > $@; \
	fi

# torch comes first and alone: plain `pip install` of anything that needs torch may bring a CUDA build of several GB.
# `+cpu` is how PyTorch names its CPU wheels on Linux; where the configured index has none (or on macOS, where every
# wheel is a CPU wheel), the plain pin is installed. CONTRIBUTING.md tells how to make pip find the CPU wheels.
# A CUDA build brings the triton that it was built for: that is taken then, in place of the pin.
$(CONSTRAINTS): $(KEY) constraints.txt
ifeq ($(TORCH),)
	@$(PIP) 'torch==$(PIN)+cpu' 2>/dev/null || { \
	  echo 'No wheel named torch==$(PIN)+cpu where pip looks: taking torch==$(PIN) as it is (on Linux this can be a'; \
	  echo 'CUDA build of several GB; see CONTRIBUTING.md, "torch").'; \
	  $(PIP) 'torch==$(PIN)'; }
	@cp constraints.txt $@
else
	@$(PIP) '$(TORCH)'
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $@
endif
	@if $(BIN)/python -m pip show -q triton > /dev/null 2>&1; then sed -i.bak '/^triton==/d' $@; fi

# Stamps in one environment: the demo must not wait for the tools of the tests.
$(VENV)/compare $(VENV)/dev $(VENV)/docs: $(VENV)/%: $(CONSTRAINTS) pyproject.toml
	@$(PIP) -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

FORCE:

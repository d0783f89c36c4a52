# Every target sets up what it needs inside this folder. Present beforehand: python3 >= 3.11, make, a C compiler.
PYTHON ?= python3
WORKERS ?= auto --maxprocesses 8
UV := $(or $(shell uv --version >/dev/null 2>&1 && command -v uv),$(CURDIR)/.uv/bin/uv)
BIN := .venv/bin
SYNCED := .venv/.synced
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
export UV

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-fast lint docs gpu-check clean

help:         ## list the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(SYNCED)    ## create .venv with every distribution installed editable
quickstart: setup   ## train, distil, evaluate and report on the bundled digits
	$(BIN)/fewstep run experiments/digits
	@echo "Report: $(CURDIR)/runs/digits/report/index.html"
test: lint          ## lint, then every test
	$(PYTEST)
test-fast: setup    ## the tests that are neither slow nor packaging
	$(PYTEST) -m "not slow and not packaging"
lint: setup         ## ruff, the floors, strict types
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
docs: setup         ## API pages into build/docs
	$(BIN)/pdoc --math --output-directory build/docs $(foreach p,schedules models samplers distill kernels lab,fewstep.$(p))
gpu-check: setup    ## tests/gpu and the kernel benchmarks, where there is a GPU
	$(BIN)/python tools/gpu_check.py
clean:              ## remove the environments and caches; runs/ stays
	rm -rf .venv .uv build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache uv.lock

$(SYNCED): pyproject.toml kernels/pyproject.toml $(wildcard packages/*/pyproject.toml) | $(UV)
	$(UV) sync --python $(PYTHON)
	@touch $@

$(CURDIR)/.uv/bin/uv:   # without the venv module (Debian splits it off), pip alone does
	$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv || $(PYTHON) -m pip install --quiet --target .uv uv

# Every target sets up what it needs inside this folder. Present beforehand: python3 >= 3.11, make, a C compiler.
PYTHON ?= python3
WORKERS ?= auto --maxprocesses 8
UV := $(or $(shell uv --version >/dev/null 2>&1 && command -v uv),$(CURDIR)/.uv/bin/uv)
BIN := .venv/bin
SYNCED := .venv/.synced
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
export UV

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-fast test-slurm test-slurm-full test-kernels-full lint docs gpu-check clean

help:         ## list the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(SYNCED)    ## create .venv with every distribution installed editable
quickstart: setup   ## train, distil, evaluate and report on the bundled digits
	$(BIN)/fewstep run experiments/digits
	@echo "Report: $(CURDIR)/runs/digits/report/index.html"
test: lint          ## lint, then every test
	$(PYTEST) -m "not (slurm and slow)"
test-fast: setup    ## the tests that are neither slow nor packaging nor on SLURM
	$(PYTEST) -m "not slow and not packaging and not slurm"
test-slurm: setup   ## jobs on a real SLURM cluster in this machine (tools/slurm_dev_cluster.sh install)
	$(BIN)/pytest -n0 -m "slurm and not slow" tests/slurm
test-slurm-full: setup    ## and the longer faults
	$(BIN)/pytest -n0 -m slurm tests/slurm
test-kernels-full: setup  ## every kernel for every architecture, by nvcc and Triton 3.9 and 3.6; before kernels are closed
	rm -rf build/kernels && FEWSTEP_CACHE=build/kernels $(BIN)/python -m fewstep.kernels.build --all
	FEWSTEP_KERNELS_FULL=1 $(PYTEST) tests/kernels
	$(UV) pip install --no-config --quiet --python $(BIN)/python --target build/triton-3.6 --no-deps 'triton==3.6.*'
	PYTHONPATH=build/triton-3.6 FEWSTEP_KERNELS_FULL=1 $(PYTEST) tests/kernels/test_ahead_of_time.py
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

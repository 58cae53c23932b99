# Two commands do everything: `make quickstart` and `make test`. Both begin with a virtual environment in .venv.
# For a CPU-only PyTorch on Linux (200 MB instead of 3 GB): make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PIP_INSTALL = .venv/bin/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help quickstart experiments test check lint test-faults clean

help:
	@echo "make quickstart   install into .venv and run the whole pipeline on handwritten digits"
	@echo "make experiments  the experiments of configs/experiments at CPU size, each with its verdicts; resumable"
	@echo "make test         install into .venv and run linters, type checks and tests"
	@echo "make test-faults  twenty or thirty kills, stops and full disks of each kind, where 'make test' runs three; and the slow tests"
	@echo "make clean        remove .venv; the workspace stays"

quickstart: .venv/installed
	.venv/bin/rae run quickstart

experiments: .venv/installed
	@for experiment in $(notdir $(basename $(wildcard configs/experiments/*.yaml))); do \
		.venv/bin/rae sweep $$experiment || exit; \
	done

test: .venv/installed-test
	$(MAKE) check

check: lint
	.venv/bin/pytest -m "not slow" -n logical --maxprocesses 8 --dist worksteal

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	# From .typing, where the folders stand as the portions of `rae` that they become in the wheel.
	cd .typing && ../.venv/bin/lint-imports --config ../pyproject.toml

test-faults: .venv/installed-test
	RAE_FAULTS=all .venv/bin/pytest --timeout 0 tests/faults
	.venv/bin/pytest -m slow

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e ".[quickstart]"
	touch $@

.venv/installed-test: .venv/installed
	$(PIP_INSTALL) -e ".[quickstart,test]"
	touch $@

clean:
	rm -rf .venv

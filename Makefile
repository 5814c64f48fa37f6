# Every command of the repository. `make` lists them.
#
# The first command that needs it makes .venv and installs qexport with everything for development,
# in the versions of constraints.txt.

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-slow torch2trt-check check-arm64 bench demo format clean

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## Make .venv and install qexport into it, with the tools of development.

test: $(INSTALLED) ## Check style, types and import layers, then run the tests (those that take long excepted).
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED) ## Run every test.
	$(BIN)/pytest

torch2trt-check: $(INSTALLED) ## Run every test about torch2trt in the real one: TORCH2TRT=path/to/checkout.
	@test -d "$(TORCH2TRT)/torch2trt" || { \
	    echo "make: TORCH2TRT=$(TORCH2TRT) is no checkout of torch2trt (github.com/NVIDIA-AI-IOT/torch2trt)" >&2; exit 2; }
	PYTHONPATH="$(abspath $(TORCH2TRT))" QEXPORT_REQUIRE_TORCH2TRT=1 $(BIN)/pytest -k torch2trt

check-arm64: $(INSTALLED) ## Install and verify bundles in an emulated arm64 Debian; options in ARM64="--bundle FILE".
	$(BIN)/python tools/check_arm64.py $(ARM64)

bench: $(INSTALLED) ## Measure the demo beside its peers, and split pools beside torch's; options in BENCH="--model ... --accuracy".
	$(BIN)/python tools/bench.py $(BENCH)
	$(BIN)/python tools/bench_pool.py

demo: $(INSTALLED) ## Quantize, export, run and measure the demo detector; write runs/demo/report.html.
	$(BIN)/qexport demo --out runs/demo

format: $(INSTALLED) ## Sort the imports and format the code.
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## Remove caches and build outputs. .venv and runs stay.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# Three attempts: the wheels come to gigabytes, and pip keeps those that a broken connection had finished.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@for attempt in 1 2 3; do \
	    $(BIN)/pip install -c constraints.txt -e '.[dev]' && touch $@ && exit 0; \
	    echo "make: installing failed (attempt $$attempt of 3)" >&2; sleep 5; \
	done; exit 1

# The export stack has wheels for Python 3.11 to 3.13. A name that is found may still not run (pyenv's
# shims), so each is asked for its version.
$(BIN)/pip:
	@for python in python3.11 python3 python3.12 python3.13; do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	        echo "$$python -m venv .venv"; $$python -m venv .venv; exit $$?; \
	    fi; \
	done; echo "make: needs Python 3.11, 3.12 or 3.13 on the PATH" >&2; exit 1

# Every target sets up what it needs; after the first time that costs nothing.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test thorough lint format bench clean setup-demo

help:            ## what there is to make
	@sed -n 's/^\([a-z-]*\): .*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 16

setup:           ## .venv with everything that developing needs
	@$(PYTHON) scripts/bootstrap.py --extras dev

setup-demo:
	@$(PYTHON) scripts/bootstrap.py --extras demo

demo: setup-demo ## fine-tune a small model on this machine and see it get better
	$(BIN)/python examples/demo.py

test: lint       ## linters, types and all tests, on every core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

thorough: setup  ## the tests that take minutes and that `make test` leaves out
	$(BIN)/python -m pytest -m thorough

lint: setup      ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup    ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup     ## posttrain and TRL side by side
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/preference.py
	$(BIN)/python benchmarks/rl.py

clean:           ## remove what was built, .venv included
	rm -rf .venv build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.egg-info' -type d -prune -exec rm -rf {} +

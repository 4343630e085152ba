# Two commands for a newcomer: `make demo` and `make test`. Both need only Python 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
BENCH := .venv-bench/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Compiled files are kept: the processes that tests start would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test coverage lint docs figures bench bars clean

demo: .venv/.demo  ## two models with three hypergradient estimators, compared; then by folds, beside scikit-learn
	$(BIN)/bilevel compare configs/quickstart.yaml
	$(BIN)/bilevel tune configs/tune.yaml

test: .venv/.dev  ## the test suite, a process for each core; ARGS=--whole: every row of its tables
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

coverage: .venv/.dev  ## the whole test suite with the lines of bilevel/ that it runs: fails below 95 %
	$(BIN)/python -m pytest -n auto --dist worksteal --cov=bilevel --cov-report=term:skip-covered --cov-fail-under=95

lint: .venv/.dev  ## style, documentation and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs  ## the pages of docs/ and the reference of all public names: build/docs/index.html
	$(BIN)/mkdocs build --quiet --config-file scripts/docs/mkdocs.yml
	@echo "wrote build/docs/index.html"

figures: .venv/.demo  ## every figure of both papers on the curse of unrolling, with numbers and claims
	$(BIN)/bilevel curse configs/curse/*.yaml

bench: .venv-bench/.done  ## this library beside its peers, a quarter of an hour: docs/benchmarks.md; ARGS="--only p1 --task unroll": one row
	$(BENCH)/python scripts/bench/peers/run.py $(ARGS)

bars: .venv/.demo  ## the bars that this library sets itself: one JSON line per measurement
	$(INSTALL) -e '.[plot,mnist]'
	$(BIN)/python scripts/bench/run.py

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (about a minute the first time) ..."
	$(INSTALL) -e '.[plot]'
	@touch $@

.venv/.dev: .venv/.demo
	$(INSTALL) -e '.[plot,test,lint]'
	@touch $@

.venv/.docs: .venv/.demo
	$(INSTALL) -e '.[docs]'
	@touch $@

# The peers have a venv of their own. Without the constraints they would replace torch by a CUDA build.
.venv-bench/.done: pyproject.toml constraints.txt
	@echo "Installing the peers into .venv-bench (a few minutes the first time) ..."
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

# `make` prints what there is to do. Every target but `lock` sets up what it needs.

PYTHON ?= python3
SCALE  ?= mini
STUDY  ?= main
BIN    := .venv/bin
UV     := $(shell command -v uv || echo .uv/bin/uv)

.DEFAULT_GOAL := help
.PHONY: help setup test check reproduce reproduce-fedloge reproduce-mdcs reproduce-lightcnn reproduce-sparsevit bench tables report schema lock

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  SCALE=smoke takes seconds; mini, the default, minutes; paper hours (LightCNN) or a GPU and days to months."

setup: .venv/ready ## make the locked environment in .venv (installs uv if it is missing)

.venv/ready: requirements.lock pyproject.toml
	@command -v $(UV) >/dev/null || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv; } || \
	  { echo "error: uv is missing and could not be installed with $(PYTHON) -m venv and pip" >&2; exit 2; }
	@test -x $(BIN)/python || $(UV) venv --quiet --python ">=3.11" .venv
	VIRTUAL_ENV=.venv $(UV) pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --no-deps --editable .
	@touch $@

test: setup ## the whole suite (what CI runs)
	$(BIN)/python -m pytest

check: setup ## lint, types, published figures with their tables and page, and the whole suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python results/tables.py --check
	$(BIN)/python results/check.py
	$(BIN)/python results/report.py --check
	$(BIN)/python -m pytest

reproduce: setup ## all four studies, one after the other, and one table of what holds
	$(BIN)/python results/reproduce_all.py --scale $(SCALE)

reproduce-fedloge: setup ## FedLoGe: methods x seeds, table, verdicts, plots
	$(BIN)/python -m fedloge.reproduce --scale $(SCALE)

reproduce-mdcs: setup ## MDCS: arms x seeds, table, verdicts, plots (STUDY=main, distillation, views, sweeps, variance)
	$(BIN)/python -m mdcs.reproduce --scale $(SCALE) --study $(STUDY)

reproduce-lightcnn: setup ## LightCNN: methods x seeds, table, verdicts, plots (STUDY=main, budget)
	$(BIN)/python -m lightcnn.reproduce --scale $(SCALE) --study $(STUDY)

reproduce-sparsevit: setup ## SparseViT: arms x seeds x pruners, table, verdicts, plots (STUDY=main, choose)
	$(BIN)/python -m sparsevit.reproduce --scale $(SCALE) --study $(STUDY)

bench: setup ## speed and memory, as ratios in one run; writes results/<paper>/benchmarks.*
	$(BIN)/python benchmarks/fedloge_round.py
	$(BIN)/python benchmarks/mdcs_step.py
	$(BIN)/python benchmarks/lightcnn_step.py
	$(BIN)/python benchmarks/lightcnn_latency.py
	$(BIN)/python benchmarks/sparsevit_step.py

tables: setup ## write the studies' texts and the READMEs' tables anew from results/
	$(BIN)/python results/tables.py

report: setup ## one page of all results, results/report/index.html
	$(BIN)/python results/report.py

schema: setup ## JSON schemas of the configurations, for editors, in schemas/
	@mkdir -p schemas
	for paper in fedloge mdcs lightcnn sparsevit; do new=schemas/.$$paper.json.tmp; \
	  $(BIN)/python -m $$paper.train --schema > $$new && mv $$new schemas/$$paper.json || { rm -f $$new; exit 2; }; done

lock: ## resolve the dependencies anew (review the diff)
	$(UV) pip compile --quiet --universal --generate-hashes --group dev pyproject.toml -o requirements.lock

# What a user and a developer run. `make` alone prints this file's targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PROTOS := $(wildcard proto/splitfed/proto/v1/*.proto)
PROTOC  = $(BIN)/python -m grpc_tools.protoc -Iproto
ARGS   ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Print this help
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS='more arguments of the tool']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: setup
setup: $(STAMP) ## Install everything into .venv (the second time does nothing)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "splitfed needs Python 3.11 or newer, but there is no $(PYTHON): install it, or run make with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import platform, sys; sys.exit(0 if sys.version_info >= (3, 11) else "splitfed needs Python 3.11 or newer, but $(PYTHON) is " + platform.python_version() + ": run make with PYTHON=/path/to/python3.11")'
	@echo "installing into $(VENV), which takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Fine-tune the embedded model: one server and three agents on this machine
	$(BIN)/splitfed demo $(ARGS)

.PHONY: test
test: $(STAMP) ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, docstrings and formatting
	$(BIN)/ruff check $(ARGS)
	$(BIN)/ruff format --check

.PHONY: types
types: $(STAMP) ## Check types
	$(BIN)/mypy $(ARGS)

.PHONY: contracts
contracts: $(STAMP) ## Check which package may import which
	$(BIN)/lint-imports $(ARGS)

.PHONY: proto
proto: $(STAMP) ## Generate splitfed/proto/v1 from proto/
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

.PHONY: proto-check
proto-check: $(STAMP) ## Fail if the generated code differs from proto/
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT \
	&& $(PROTOC) --python_out="$$folder" --pyi_out="$$folder" --grpc_python_out="$$folder" $(PROTOS) \
	&& { diff -r -x __init__.py -x __pycache__ "$$folder/splitfed/proto/v1" splitfed/proto/v1 \
	|| { echo "the generated code is not what proto/ gives: run make proto and commit the result" >&2; exit 1; }; }

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks, one after the other
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

.PHONY: notebooks
notebooks: $(STAMP) ## Run the notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake notebooks $(ARGS)

.PHONY: clean
clean: ## Remove what make and the tools made, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

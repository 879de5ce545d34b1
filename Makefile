# Every target makes what it needs first; `make help` lists them.

PYTHON ?= python3
PY := .venv/bin/python
MINUTES ?= 30
NEWEST_VLLM := $(shell $(PYTHON) -c "import runpy; print(runpy.run_path('vllm_plugin/releases.py')['TESTED'][-1])")

.DEFAULT_GOAL := help
.PHONY: help install model demo playground releases oldest-triton tritons clients readers checkers browser check test style types fast script lint bench docs soak clean
MAKEFLAGS += --no-print-directory

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## .venv with vLLM for this machine, this project and its tools
	@$(PYTHON) tools/install.py

model: install  ## .models/SmolLM2-135M-Instruct, the base model of the examples
	@$(PY) examples/smollm2.py

demo: install  ## the quick start
	@$(PY) examples/demo.py

playground: install  ## the demonstration's server with its playground, until Ctrl-C
	@$(PY) examples/playground.py

check: | $(PY)  ## format, lint, types and the fast tests, in two minutes
	@$(MAKE) style
	@$(MAKE) --jobs 2 types fast

style: | $(PY)  ## ruff, its lint and its format
	@$(PY) -m ruff check --quiet --output-format concise
	@$(PY) -m ruff format --check --quiet --output-format concise

types: | $(PY)  ## mypy
	@$(PY) -m mypy

fast: | $(PY)  ## the fast tests: no engine, no process, no test of a second
	@$(PY) -m pytest -q -n 2 --dist loadgroup -m "not slow and not engine and not soak"

$(PY):  # an environment that is there is used as it is
	@$(MAKE) install

script: checkers  ## TypeScript and Biome, of the playground's page
	@.venv/page/node_modules/.bin/tsc --project merged_lora/playground
	@cd merged_lora/playground && $(CURDIR)/.venv/page/node_modules/.bin/biome check --error-on-warnings --reporter=summary

lint: style types script  ## all three

test: install lint model releases oldest-triton browser  ## lint, then every test that this machine can run
	@PYTHONPATH=$(CURDIR)/.venv/vllm-$(NEWEST_VLLM) $(PY) -m pytest -n 2 --dist loadgroup

releases: install  ## the oldest and the newest vLLM, beside the one that is installed
	@$(PYTHON) tools/install.py --vllm ends

oldest-triton: install  ## the oldest Triton that the kernels are tested on
	@$(PYTHON) tools/other_releases.py triton --oldest

tritons: install  ## the other releases of Triton that make soak tests the kernels on
	@$(PYTHON) tools/other_releases.py triton

clients: install  ## other projects' clients, with which make soak asks a server
	@$(PYTHON) tools/clients.py

readers: install  ## other releases of PEFT, and Diffusers, in which make soak reads what we write
	@$(PYTHON) tools/other_releases.py peft diffusers

checkers: install  ## what checks the playground's page, by npm
	@$(PYTHON) tools/page.py checkers

browser: install  ## Chromium, if root has none
	@$(PYTHON) tools/page.py browser

bench: install  ## the benchmarks
	@$(PY) -m merged_lora.bench cpu

docs: install  ## build/site, the documentation
	@$(PY) tools/render_pages.py
	@$(PY) -m mkdocs build --strict --quiet

soak: model tritons clients readers checkers browser  ## the long tests, then random load on a real server; MINUTES=30
	@$(PYTHON) tools/install.py --vllm all
	@$(PY) -m pytest -m soak
	@for vllm in .venv/vllm-*; do PYTHONPATH=$(CURDIR)/$$vllm $(PY) -m pytest tests/serving || exit 1; done
	@$(PY) tests/serving/soak.py --minutes $(MINUTES)

clean:  ## remove builds and caches; .venv and .models stay
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.models/*' -prune -exec rm -rf {} +

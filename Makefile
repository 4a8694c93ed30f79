# Everything runs in .venv, which is made on first use; see `make help`.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
    $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    && { echo $$p; break; }; done)
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet install -c constraints.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
SWEEP_ARGS ?=
MATRIX_ARGS ?=

# One thread per process: tests start several processes, and more threads only fight.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test fmt lint type bench sweep matrix docs site check interop install clean

help:  ## show this table
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## convert a small model, prove it by logits, train it on 2 ranks
	@$(PY) examples/demo.py $(DEMO_ARGS)

test: $(VENV)/.installed  ## run the tests; PYTEST_ARGS="-k layout -x" narrows them
	@$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

fmt: $(VENV)/.lint  ## format the code and apply the safe fixes
	@$(PY) -m ruff check --fix --exit-zero --quiet .
	@$(PY) -m ruff format .

lint: $(VENV)/.lint  ## check style and formatting
	@$(PY) -m ruff check . ; checked=$$?; $(PY) -m ruff format --check . && exit $$checked

type: $(VENV)/.lint  ## check types (mypy, strict, tests included)
	@$(PY) -m mypy

bench: $(VENV)/.bench  ## measure speed and memory against a plain file copy
	@$(PY) -m bench $(BENCH_ARGS)

sweep: $(VENV)/.installed  ## carry every architecture of transformers everywhere (an hour); SWEEP_ARGS="--only llama"
	@PYTHONPATH=tests $(PY) -m sweep --write $(SWEEP_ARGS)

matrix: $(VENV)/.created  ## run the tests under another Python and torch; MATRIX_ARGS="--torch 2.6.0"
	@$(PY) tests/matrix.py $(MATRIX_ARGS)

docs: $(VENV)/.installed  ## write the generated pages of docs/ and the index of the tables anew
	@$(PY) docs/generate.py

site: $(VENV)/.docs  ## build the documentation site into out/site/html, strictly
	@$(PY) docs/site.py

check:  ## everything CI runs: lint, type, test
	@.ci/run

interop: $(VENV)/.interop  ## add the tools that some tests compare with: deepspeed, peft, ...

install: $(VENV)/.installed  ## make .venv with the package and its test dependencies

clean:  ## remove .venv, caches and results
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with a working venv module was found;" \
	    "install one (Debian: apt install python3-venv) or pass PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: the pinned version decides the build, not a dependant's range.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing torch and the test dependencies (minutes, once)" >&2
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(PIP) --editable '.[test]'
	@touch $@

# deepspeed looks at the installed torch while it is built, so its build may not be isolated.
$(VENV)/.interop: $(VENV)/.installed
	@echo "installing deepspeed, peft, lightning and others that tests compare with" >&2
	@$(PIP) setuptools wheel ninja py-cpuinfo
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --editable '.[test,interop]'
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	@$(PIP) --editable '.[test,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) --editable '.[test,docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@$(PIP) --editable '.[test,bench]'
	@touch $@

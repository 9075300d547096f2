# make train   install into .venv, train on the embedded default data, show the results
# make test    the same .venv, every CPU tier
# make gpu     on a machine with a GPU and no network: GPU tests, then the benches with rivals
# make lint    ruff

VENV := .venv
PY := $(VENV)/bin/python
# The first interpreter that is 3.11 or newer; python3 is asked first.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_INSTALL = $(PY) -m pip install -q --disable-pip-version-check
export PYTHONDONTWRITEBYTECODE ?= 1

.PHONY: train test lint gpu clean
.DELETE_ON_ERROR:

# constraints.txt is what CI runs. Where a registry's torch wants another triton, pyproject.toml's ranges decide.
define install
	@$(PIP_INSTALL) -c constraints.txt -e '.[$(1)]' || { \
	  echo "constraints.txt does not fit this machine's torch; installing within the ranges of pyproject.toml"; \
	  $(PIP_INSTALL) -e '.[$(1)]'; }
	@touch $@
endef

$(PY):
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer on the PATH, or make PYTHON=/path/to/python3"; exit 1; }
	@echo "creating $(VENV) and installing (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)

HOST_SOURCES := $(wildcard csrc/host/*)

$(VENV)/.train: pyproject.toml setup.py constraints.txt $(HOST_SOURCES) | $(PY)
	$(call install,quickstart)

$(VENV)/.dev: pyproject.toml setup.py constraints.txt $(HOST_SOURCES) $(VENV)/.train
	$(call install,dev)

train: $(VENV)/.train
	@$(VENV)/bin/siglip2 train --config quickstart $(ARGS)

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Three runs: eager, ahead-of-time compiles and gloo processes; Triton's interpreter; other libraries' own code.
test: $(VENV)/.dev
	@echo "tier 1 of 3: reference, compile, gloo"
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist loadfile tests
	@echo "tier 2 of 3: Triton kernels in the interpreter"
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/pytest -q -n 2 -m interpreter tests/kernels
	@echo "tier 3 of 3: parity with open_clip and timm, in a layered environment"
	@$(PY) tests/parity/make_venv.py
	@OMP_NUM_THREADS=2 SIGLIP2_PARITY=1 .venv-parity/bin/python -m pytest -q tests/parity/test_open_clip.py tests/parity/test_open_clip_loss.py tests/parity/test_timm.py

# WHEELS=folder: rivals to install for the benches.  ARGS: see `python3 -P -m siglip2_bench.gpu --help`.
gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu needs a machine with an NVIDIA GPU: it runs the GPU tests, then" \
	  "every bench case beside its rivals, into bench/results/<gpu>/. This machine has none."; exit 2; }
	@python3 -m pip install -q --no-deps --no-build-isolation -e .
	@python3 -P -m siglip2_bench.gpu $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-parity build *.egg-info

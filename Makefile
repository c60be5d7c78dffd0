# make demo    a real sweep on this machine, from nothing to the best models
# make test    every test, with a real Slurm (installed from the system's packages where that is possible)
# make check   format, lint, types and the tests that need no Slurm, in under a minute
# make soak    the tests that take minutes
# make bench   how fast it is, beside its alternatives
# make docs    draw the figures that are made from the code

SHELL := /bin/bash
PYTHON ?= python3
# Slurm's daemons, and munge's, are not on every user's PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

BIN := .venv/bin
STAMP := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/pytest -n 8 --dist worksteal
# What is shown by examples drawn at random: a hundred of each in a test run, a thousand in a long one.
LAWS := $(addprefix tests/,stats/test_summary.py stats/test_batch.py stats/test_containers.py stats/test_wire.py \
  results/test_reduction.py results/test_fold.py results/test_fold_cache.py)
SLURM_PROGRAMS := sbatch srun slurmctld slurmd munged slurmdbd mariadbd my_print_defaults shellcheck
# The last two are for accounting (sacct); none of these packages starts a service without a configuration.
SLURM_PACKAGES := slurm-wlm munge shellcheck slurmdbd mariadb-server-core mariadb-client

.PHONY: demo test check soak bench docs environment slurm

demo: environment
	$(BIN)/orc run jobs/digits_mlp.yaml

test: environment slurm
	$(PYTEST) -m "not soak"

check: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slurm and not soak" --ignore tests/on_slurm

soak: environment slurm
	ORC_SOAK=1 $(BIN)/pytest -n 2 $(LAWS)
	$(BIN)/pytest -m soak

bench: environment
	@for script in benchmarks/{sweep,outcome,summary,fold,reduce,resnet}.py; do echo "$$script" && $(BIN)/python "$$script" || exit; done

docs: environment
	$(BIN)/python docs/figures/rooms.py

environment: $(STAMP)

# torch comes first and alone, so that a machine with a build of its own choosing gets that one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "'$(PYTHON)' can't make environments: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv; the first time takes minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.[dev]'
	@touch $@

slurm:
	@missing=; for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing=1; done; \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES) && exit; \
	fi; \
	echo "Slurm is missing and can't be installed here (that takes root and apt-get): its tests are skipped."

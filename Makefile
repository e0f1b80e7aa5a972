# `make help` lists the targets. Everything is installed into .venv, and only there.

# The Python that .venv is made with: 3.10 or newer, with its venv module.
PYTHON ?= python3

# Steps of the demo's two trainings, and flags of all its scripts: `make demo DEMO_FLAGS=` plots on
# the server that `make visdom` starts.
DEMO_VQGAN_STEPS ?= 300
DEMO_SAMPLER_STEPS ?= 1600
DEMO_FLAGS ?= --no_visdom

VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install test test-all demo visdom clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

install: .venv/installed ## make .venv and install all that is needed, as pinned in constraints.txt

test: .venv/installed ## run the tests, without the slow ones
	$(VENV_PYTHON) -m pytest

test-all: .venv/installed ## run the tests, the slow ones too
	$(VENV_PYTHON) -m pytest -m "slow or not slow"

demo: .venv/installed ## train both stages on the digits and report on them: minutes on a CPU
	$(VENV_PYTHON) train_vqgan.py --dataset digits --log_dir demo_vqgan --amp --ema \
	  --train_steps $(DEMO_VQGAN_STEPS) $(DEMO_FLAGS)
	$(VENV_PYTHON) train_sampler.py --sampler absorbing --dataset digits \
	  --log_dir demo_absorbing --ae_load_dir demo_vqgan --ae_load_step $(DEMO_VQGAN_STEPS) \
	  --amp --ema --lr_schedule cosine --train_steps $(DEMO_SAMPLER_STEPS) $(DEMO_FLAGS)
	$(VENV_PYTHON) experiments/digits_report.py --log_dir demo \
	  --load_dir demo_absorbing --load_step $(DEMO_SAMPLER_STEPS) --amp --ema --n_samples 500 \
	  $(DEMO_FLAGS)

visdom: .venv/installed ## start the visdom server that the training scripts draw on
	$(VENV_PYTHON) -m utils.logging.visdom_server

clean: ## remove .venv and what tools left behind, but nothing under logs/, latents/, statistics/
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . \( -name .git -o -path ./logs -o -path ./latents -o -path ./statistics \) -prune -o \
	  -name __pycache__ -prune -exec rm -rf {} +

# Both stamps are written last: what was interrupted is run again, and pip goes on from what is
# there. An environment that somebody made by hand is used as it is.
.venv/made:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null || \
	  { echo '"$(PYTHON)" is no Python 3.10 or newer: try make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo '"$(PYTHON)" cannot make environments: on Debian, apt install python3-venv' >&2; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	touch $@

# Three things that plain `pip install -e .` does not get right:
# natten's setup imports torch, so torch comes first and natten is built without isolation;
# visdom's setup imports pkg_resources, which is gone from setuptools 82 on, so the pinned
# setuptools builds it, again without isolation; and natten's setup would compile CUDA kernels, for
# long and with tools of its own, where it sees a GPU, so it sees none (requirements.yml brings the
# kernels prebuilt).
.venv/installed: pyproject.toml constraints.txt | .venv/made
	$(PIP) install --constraint constraints.txt setuptools wheel torch
	CUDA_VISIBLE_DEVICES= $(PIP) install --constraint constraints.txt --no-build-isolation \
	  --editable ".[test]"
	touch $@

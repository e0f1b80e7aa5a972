# `make help` lists the targets. Everything is installed into .venv, and only there; only
# `make test-lowest` has an environment of its own, .venv-lowest.

# The Python that these are made with: 3.10 or newer, with its venv module.
PYTHON ?= python3

# Steps of the demo's two trainings, and flags of all its scripts: `make demo DEMO_FLAGS=` plots on
# the server that `make visdom` starts.
DEMO_VQGAN_STEPS ?= 900
DEMO_SAMPLER_STEPS ?= 2200
DEMO_FLAGS ?= --no_visdom

# Seconds after which `make watch RUN=...` draws again; 0 draws once.
EVERY ?= 0

# Flags of the page, such as another run: `make web WEB_FLAGS="--load_dir RUN"`.
WEB_FLAGS ?=

# What `make photos` learns from, emoji drawn in 3D that it fetches or a folder of images, for how
# many steps, and flags of all its scripts. Each folder has runs of its own.
EMOJI := pictures/fluent_emoji
PHOTOS ?= $(EMOJI)
PHOTOS_VQGAN_STEPS ?= 3000
PHOTOS_SAMPLER_STEPS ?= 10000
PHOTOS_FLAGS ?= --no_visdom
PHOTOS_NAME = $(shell basename "$(PHOTOS)" | tr -c '[:alnum:]\n' _)
PHOTOS_PLACE = $(shell (cd "$(PHOTOS)" 2>/dev/null && pwd -P || echo "$(PHOTOS)") | cksum | cut -c1-4)
PHOTOS_RUN = photos_$(PHOTOS_NAME)$(if $(filter $(EMOJI),$(PHOTOS)),,_$(PHOTOS_PLACE))

VENV_PYTHON := .venv/bin/python
PIP = $(@D)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install test test-all test-lowest test-page demo photos web gpu-check visdom watch clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

install: .venv/installed ## make .venv and install all that is needed, as pinned in constraints.txt

test: .venv/installed ## run the tests, without the slow ones
	$(VENV_PYTHON) -m pytest

test-all: .venv/installed ## run the tests, the slow ones too
	$(VENV_PYTHON) -m pytest -m "slow or not slow"

test-lowest: .venv-lowest/installed ## run `make test` with the lowest versions in pyproject.toml
	.venv-lowest/bin/python -m pytest

test-page: .venv/installed-page ## run the tests of the page, in a browser where chromium is installed
	$(VENV_PYTHON) -m pytest tests/utils/web -m "slow or not slow"

demo: .venv/installed ## train both stages on the digits and report on them: minutes on a CPU
	$(VENV_PYTHON) train_vqgan.py --dataset digits --log_dir demo_vqgan --amp --ema \
	  --train_steps $(DEMO_VQGAN_STEPS) --resume $(DEMO_FLAGS)
	$(VENV_PYTHON) train_sampler.py --sampler absorbing --dataset digits \
	  --log_dir demo_absorbing --ae_load_dir demo_vqgan --ae_load_step $(DEMO_VQGAN_STEPS) \
	  --amp --ema --train_steps $(DEMO_SAMPLER_STEPS) --resume $(DEMO_FLAGS)
	$(VENV_PYTHON) experiments/digits_report.py --log_dir demo \
	  --load_dir demo_absorbing --load_step $(DEMO_SAMPLER_STEPS) --amp --ema --n_samples 500 \
	  $(DEMO_FLAGS)

photos: .venv/installed ## train both stages on colour pictures, or on PHOTOS=FOLDER: half an hour
	$(if $(filter $(EMOJI),$(PHOTOS)),$(VENV_PYTHON) -m utils.data.fluent_emoji $(EMOJI))
	$(VENV_PYTHON) train_vqgan.py --dataset custom --custom_dataset_path "$(PHOTOS)" \
	  --log_dir $(PHOTOS_RUN)_vqgan --ch_mult 1 1 2 2 --horizontal_flip --cache_pixels \
	  --validation_images 128 \
	  --amp --ema --train_steps $(PHOTOS_VQGAN_STEPS) --resume $(PHOTOS_FLAGS)
	$(VENV_PYTHON) train_sampler.py --sampler absorbing --dataset custom \
	  --custom_dataset_path "$(PHOTOS)" --log_dir $(PHOTOS_RUN)_absorbing \
	  --ae_load_dir $(PHOTOS_RUN)_vqgan --ae_load_step best --horizontal_flip --cache_pixels \
	  --amp --ema --train_steps $(PHOTOS_SAMPLER_STEPS) --resume $(PHOTOS_FLAGS)
	$(VENV_PYTHON) experiments/reconstruct.py --load_dir $(PHOTOS_RUN)_vqgan --load_step best \
	  --amp --ema --log_dir $(PHOTOS_RUN) $(PHOTOS_FLAGS)
	$(VENV_PYTHON) experiments/get_samples.py --load_dir $(PHOTOS_RUN)_absorbing --load_step best \
	  --amp --ema --n_samples 100 --temp 0.8 --log_dir $(PHOTOS_RUN) $(PHOTOS_FLAGS)
	@echo "images with their reconstructions, and samples:"; \
	  ls logs/$(PHOTOS_RUN)/images/pairs_*.png logs/$(PHOTOS_RUN)/images/samples_*.png

web: .venv/installed-web ## start a page to play with the demo's model, in a browser
	$(VENV_PYTHON) experiments/web_demo.py $(WEB_FLAGS)

gpu-check: .venv/installed ## check and measure the GPU in about eight minutes, into results/
	$(VENV_PYTHON) benchmarks/gpu.py

visdom: .venv/installed ## start the visdom server, which shows all runs under logs/
	$(VENV_PYTHON) -m utils.logging.visdom_server

watch: .venv/installed ## draw the curves of RUN as logs/RUN/curves.png, every EVERY seconds
	@$(VENV_PYTHON) -m utils.logging.watch "$(RUN)" --every "$(EVERY)"

clean: ## remove both environments and what tools left behind, but nothing that runs have made
	rm -rf .venv .venv-lowest build *.egg-info .pytest_cache .hypothesis
	find . \( -name .git -o -path ./logs -o -path ./latents -o -path ./statistics -o \
	  -path ./pixels -o -path ./pictures -o -path ./results \) -prune -o \
	  -name __pycache__ -prune -exec rm -rf {} +

# The stamps are written last: what was interrupted is run again, and pip goes on from what is
# there. An environment that somebody made by hand is used as it is.
.venv/made .venv-lowest/made:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null || \
	  { echo '"$(PYTHON)" is no Python 3.10 or newer: try make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo '"$(PYTHON)" cannot make environments: on Debian, apt install python3-venv' >&2; exit 1; }
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	touch $@

# Three things that plain `pip install -e .` does not get right:
# natten's setup imports torch, so torch comes first and natten is built without isolation;
# visdom's setup imports pkg_resources, which is gone from setuptools 82 on, so the pinned
# setuptools builds it, again without isolation; and natten's setup would compile CUDA kernels, for
# long and with tools of its own, where it sees a GPU, so it sees none (requirements.yml brings the
# kernels prebuilt).
.venv/installed: PINS := constraints.txt
.venv-lowest/installed: PINS := .venv-lowest/constraints.txt
.venv-lowest/installed: .venv-lowest/constraints.txt
.venv/installed .venv-lowest/installed: %/installed: pyproject.toml constraints.txt | %/made
	$(PIP) install --constraint $(PINS) setuptools wheel torch
	CUDA_VISIBLE_DEVICES= $(PIP) install --constraint $(PINS) --no-build-isolation \
	  --editable ".[test]"
	touch $@

.venv/installed-web: .venv/installed
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[web]"
	touch $@

.venv/installed-page: .venv/installed
	$(PIP) install --constraint constraints.txt --no-build-isolation \
	  --editable ".[test,web,browser]"
	touch $@

# The lower bounds in pyproject.toml as pins; constraints.txt pins what those need in turn, save the
# CUDA of another torch.
.venv-lowest/constraints.txt: pyproject.toml constraints.txt | .venv-lowest/made
	{ sed -n 's/.*"\([a-z][a-z0-9-]*\)>=\([0-9.]*\)[^";]*\(;[^"]*\)*".*/\1==\2\3/p' pyproject.toml; \
	  sed -n '/^wheel==/,/^# torch/p' constraints.txt; } > $@

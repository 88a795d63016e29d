# Two commands on a fresh machine: `make train` and `make test`.  Each sets up its own virtual environment first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup train test check figures
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

train: setup
	$(RUN) main.py --cfg configs/vmamba_digits.yaml

test: setup
	$(RUN) -m pytest

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_imports.py

# The README's pictures, from the run of `make train` (about eight minutes with it).
DIGITS := output/vmamba_digits/default
FIGURES := output/figures

figures: setup
	test -f $(DIGITS)/best.pth || $(MAKE) train
	$(RUN) -m pip install --quiet --editable '.[analysis]'
	$(RUN) analyze/erf.py --size 96 --output $(FIGURES)/erf
	$(RUN) analyze/erf.py --models vmamba_digits --weights $(DIGITS)/best.pth --size 32 --num-images 50 \
		--output $(FIGURES)/erf_digits
	$(RUN) analyze/activation_map.py docs/figures/digit.png --model vmamba_digits --weights $(DIGITS)/best.pth \
		--size 64 --layer 0.1 --at 0.5,0.4 --output $(FIGURES)/activation_map
	$(RUN) analyze/gradcam.py docs/figures/digit.png --model vmamba_digits --weights $(DIGITS)/best.pth \
		--size 32 --layers 0.0 0.1 1.0 1.1 --output $(FIGURES)/gradcam
	$(RUN) analyze/curves.py $(DIGITS) --output $(FIGURES)/curves
	$(RUN) analyze/scale.py --output $(FIGURES)/scale
	for folder in $(FIGURES)/*; do cp $$folder/*.png docs/figures/$$(basename $$folder).png; done

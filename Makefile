# Two commands on a fresh machine: `make train` and `make test`.  Each sets up its own virtual environment first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup train train-detection train-segmentation test check figures mutants graph
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

train: setup
	$(RUN) main.py --cfg configs/vmamba_digits.yaml

# A small Mask R-CNN on scenes of digits (about ten minutes on two cores).
train-detection: setup
	$(RUN) main.py --cfg configs/scenes_detection.yaml

# A small UperNet on scenes of digits (about eight minutes on one core).
train-segmentation: setup
	$(RUN) main.py --cfg configs/scenes_segmentation.yaml

test: setup
	$(RUN) -m pytest

# Deliberate mistakes, each of which the tests must catch (about ten minutes).
mutants: setup
	$(RUN) tests/mutants.py

# Which room imports which.
graph: setup
	@$(RUN) tests/test_imports.py

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_imports.py

# The pictures of README and docs/pictures.md, all of them anew, from runs of their own (about 25 minutes).
override FIGURES := output/figures
DIGITS := $(FIGURES)/vmamba_digits/default
PICTURES := architecture tradeoff scenes erf erf_digits activation_map gradcam curves scale

figures: setup
	$(RUN) -m pip install --quiet --editable '.[analysis]'
	rm -rf $(FIGURES)
	$(RUN) main.py --cfg configs/vmamba_digits.yaml --output $(FIGURES)
	$(RUN) main.py --cfg configs/scenes_detection.yaml --output $(FIGURES)
	$(RUN) main.py --cfg configs/scenes_segmentation.yaml --output $(FIGURES)
	$(RUN) analyze/architecture.py --output $(FIGURES)/architecture
	$(RUN) analyze/tradeoff.py --output $(FIGURES)/tradeoff
	$(RUN) analyze/scenes.py --detector $(FIGURES)/scenes_detection/default/best.pth \
		--segmenter $(FIGURES)/scenes_segmentation/default/best.pth --output $(FIGURES)/scenes
	$(RUN) analyze/erf.py --output $(FIGURES)/erf
	$(RUN) analyze/erf.py --models vmamba_digits --weights $(DIGITS)/best.pth --size 32 --num-images 50 \
		--output $(FIGURES)/erf_digits
	$(RUN) analyze/activation_map.py docs/figures/digit.png --model vmamba_digits --weights $(DIGITS)/best.pth \
		--size 64 --layer 0.1 --at 0.5,0.4 --output $(FIGURES)/activation_map
	$(RUN) analyze/gradcam.py docs/figures/digit.png --model vmamba_digits --weights $(DIGITS)/best.pth \
		--size 32 --layers 0.0 0.1 1.0 1.1 --output $(FIGURES)/gradcam
	$(RUN) analyze/curves.py $(DIGITS) --output $(FIGURES)/curves
	$(RUN) analyze/scale.py --output $(FIGURES)/scale
	for name in $(PICTURES); do cp $(FIGURES)/$$name/*.png docs/figures/$$name.png || exit 1; done

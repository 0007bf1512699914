# make demo     set up .venv, generate a small dataset, train a ResNet-20 on it
# make test     set up .venv, run linters and tests: about 10 minutes on two idle cores
# make lint     ruff and mypy
# make format   format the code
# make bench    input pipeline against torchvision's; IMAGES=FOLDER measures photographs
# make clean    remove .venv and caches
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Generated data of the demo; its run directory is in runs/demo/.
DEMO_DATA := data/demo

.PHONY: help demo test lint format bench clean
help:
	@sed -n 's/^# make /make /p' Makefile

$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "PYTHON: expected 3.11 or newer, found %d.%d; use make PYTHON=/path/to/python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV); downloading PyTorch takes a few minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	@test -f $(DEMO_DATA)/.synthetic || $(BIN)/python -m datamodules.synthetic imagenet $(DEMO_DATA) --classes 6 --train 150 --val 50 --size 64
	$(BIN)/python train.py fit --config configs/classification/demo.yaml
	@echo
	@echo "The config is configs/classification/demo.yaml. Continue this run with more epochs:"
	@echo "    $(BIN)/python train.py fit --resume last --experiment demo --trainer.max_epochs 12"
	@echo "A killed run resumes the same way, to the same bits: try Ctrl-C, or kill -9."

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.input_pipeline $(IMAGES)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info

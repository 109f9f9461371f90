# make demo   draws sample data, trains and evaluates on it, and leaves checkpoints and pictures in demo/
# make pictures   runs the demo and makes README.rst's pictures of its pictures
# make test   runs every test on the CPU, whether there is a GPU or not
# make test-gpu   runs the tests that need a GPU
# make gpu    runs those and the CUDA benchmarks, and leaves the card, versions and figures in gpu.json;
#             DATA=DIR: with the photographs of a folder in the COCO 2017 layout instead of drawn images
# make lint   checks style and types, and that the docs build without warnings
# All make .venv first; PYTHON names the interpreter that it is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEMO := demo
DEMO_FLAGS = --data $(DEMO)/data --output $(DEMO)/run --backbone resnet18 --backbone-weights none \
	--epochs 10 --batch-size 4 --eval-batch-size 16 --num-workers 2 --lr 0.08 --warmup 60 --multistep 8 \
	--evaluation 4 9 --target 0.3

.PHONY: venv demo pictures test test-gpu gpu lint clean

venv: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: venv
	$(BIN)/python -m src.data.synthetic $(DEMO)/data
	$(BIN)/python main.py $(DEMO_FLAGS) $$($(BIN)/python -m src.runtime.precision)
	@echo "The pictures, figures and checkpoints are in $(DEMO)/run."

pictures: demo
	$(BIN)/python docs/pictures.py $(DEMO)/run

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: venv
	$(BIN)/python -m pytest -q -m gpu

gpu: venv
	$(BIN)/python -m pytest -q -m gpu; tested=$$?; $(BIN)/python -m benchmarks --gpu --json gpu.json $(if $(DATA),--data $(DATA)) && exit $$tested

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for page in *.rst docs/*.rst tests/README.rst tests/oracle/README.rst; do $(BIN)/rst2html --halt=warning $$page > /dev/null || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO) gpu.json

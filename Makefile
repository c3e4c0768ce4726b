# Needs Python >= 3.10, pip and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EMOJI_STYLES ?= ../shared/data/emoji-styles
JUDGE ?= ../shared/tools/emoji_judge.py
# More for `make train-tiny`, such as TRAIN_OPTIONS=compile_layers=true where there is a C++ compiler.
TRAIN_OPTIONS ?=
# One thread per test worker: more only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow test-quantization test-gpu check style data vae train-tiny evaluate-tiny clean

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py

test: $(VENV)/.done
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(VENV)/.done
	$(PYTEST) -m slow

# Apart from the rest: where torchao is installed, every program that loads transformers prints its warnings.
test-quantization: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/quantization \
		torchao bitsandbytes -c constraints.txt
	PYTHONPATH=$(VENV)/quantization $(PYTEST) tests/integration/test_size.py

test-gpu: $(VENV)/.done
	$(PYTEST) -m gpu

check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundled data, from the full set.
data: $(VENV)/.done
	$(BIN)/python -m mmar.training.emoji_lite $(EMOJI_STYLES)

# The bundled checkpoint: its VAE (24 minutes), then the model; docs/runs.md has the times.
runs/vae/report.json: | $(VENV)/.done
	$(BIN)/python -m mmar.training.train_vae --data checkpoints/emoji-lite/train.parquet \
		--eval_data checkpoints/emoji-lite/test.parquet --out runs/vae

vae: runs/vae/report.json

train-tiny: runs/vae/report.json
	$(BIN)/python -m mmar.training.init_tiny --config configs/mmar-tiny --data checkpoints/emoji-lite/train.parquet \
		--vae runs/vae --out runs/init
	$(BIN)/python -m mmar.training.train training/recipes/mmar_tiny.yaml model=runs/init \
		data=checkpoints/emoji-lite/train.parquet output_dir=runs/mmar-tiny $(TRAIN_OPTIONS)
	$(BIN)/python -m mmar.training.train training/recipes/mmar_tiny_answers.yaml model=runs/mmar-tiny/final \
		data=checkpoints/emoji-lite/train.parquet output_dir=runs/mmar-tiny-answers $(TRAIN_OPTIONS)
	$(BIN)/python -m mmar.conversion.export runs/mmar-tiny-answers/final checkpoints/mmar-tiny --guidance_scale 2.0

evaluate-tiny: $(VENV)/.done
	$(BIN)/python -m mmar.evaluation.emoji_styles checkpoints/mmar-tiny --data checkpoints/emoji-lite/test.parquet \
		--out runs/evaluation --judge $(JUDGE)
	$(BIN)/python -m mmar.conversion.model_card checkpoints/mmar-tiny --facts configs/mmar-tiny/card.yaml \
		--evaluation runs/evaluation/result.json --repo_id checkpoints/mmar-tiny

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info

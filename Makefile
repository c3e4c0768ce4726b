# Needs Python >= 3.10, pip and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EMOJI_STYLES ?= ../shared/data/emoji-styles
JUDGE ?= ../shared/tools/emoji_judge.py
# Rows to measure mmar-tiny on: the bundled one was trained on the rows beside these.
TINY_TEST ?= checkpoints/emoji-lite/test.parquet
# More for `make train-tiny`, such as TRAIN_OPTIONS=compile_layers=true where there is a C++ compiler.
TRAIN_OPTIONS ?=
# One thread per test worker: more only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

KITS := $(VENV)/kits

.PHONY: demo test test-slow test-quantization test-kits test-gpu check style data vae train-tiny evaluate-tiny clean

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

# Apart from the rest: the kits are some 600 MB, and their import changes what other programs do.
test-kits: $(KITS)/.done
	MMAR_KITS=$(KITS) $(PYTEST) tests/integration/test_vlmevalkit.py tests/integration/test_lmms_eval.py

$(KITS)/.done: tests/kits.txt $(VENV)/.done
	rm -rf $(KITS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(KITS) -r tests/kits.txt
	touch $@

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
	$(BIN)/python -m mmar.training.emoji_rows $(EMOJI_STYLES) --out checkpoints/emoji-lite --lite

# The bundled checkpoint, from all of emoji-styles: rows, VAE, untrained model, cached latents, three stages. Each step
# goes on where it stopped; docs/runs.md has the times.
TINY_DATA := runs/emoji-styles
TINY_TRAIN = $(BIN)/python -m mmar.training.train training/recipes/$(1).yaml model=$(2) data=$(TINY_DATA)/train.parquet \
	latents=runs/latents output_dir=$(3) $(TRAIN_OPTIONS)

$(TINY_DATA)/train.parquet: | $(VENV)/.done
	$(BIN)/python -m mmar.training.emoji_rows $(EMOJI_STYLES) --out $(TINY_DATA)

TRAIN_VAE = $(BIN)/python -m mmar.training.train_vae --config configs/mmar-tiny --data $(TINY_DATA)/train.parquet \
	--eval_data $(TINY_DATA)/test.parquet

runs/vae_start/report.json: | $(TINY_DATA)/train.parquet
	$(TRAIN_VAE) --out runs/vae_start --num_steps 15000 --num_views 32 --word_weight 0.3

# It draws well by then; the words take longer.
runs/vae/report.json: | runs/vae_start/report.json
	$(TRAIN_VAE) --start runs/vae_start --out runs/vae --num_steps 12000 --batch_size 8 --num_views 64 --word_weight 0.5 \
		--learning_rate 1.0e-3

vae: runs/vae/report.json

runs/init/config.json: | runs/vae/report.json
	$(BIN)/python -m mmar.training.init_tiny --config configs/mmar-tiny --data $(TINY_DATA)/train.parquet \
		--vae runs/vae --out runs/init

runs/latents/broken.json: | runs/init/config.json
	$(BIN)/python -m mmar.training.latents $(TINY_DATA)/train.parquet --model runs/init --out runs/latents \
		--num_copies 8 --batch_size 256

train-tiny: | runs/latents/broken.json
	$(call TINY_TRAIN,mmar_tiny_stage1,runs/init,runs/stage1)
	$(call TINY_TRAIN,mmar_tiny_stage2,runs/stage1/final,runs/stage2)
	$(call TINY_TRAIN,mmar_tiny_stage3,runs/stage2/final,runs/stage3)
	$(BIN)/python -m mmar.conversion.export runs/stage3/final checkpoints/mmar-tiny --guidance_scale 2.0

evaluate-tiny: $(VENV)/.done
	$(BIN)/python -m mmar.evaluation.emoji_styles checkpoints/mmar-tiny --data $(TINY_TEST) \
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

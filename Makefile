# Needs Python >= 3.10, pip and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EMOJI_STYLES ?= ../shared/data/emoji-styles
JUDGE ?= ../shared/tools/emoji_judge.py
# Rows to measure mmar-tiny on: all of the set's test rows where it is at hand, else the bundled ones among them.
TINY_TEST ?= $(if $(wildcard $(EMOJI_STYLES)),runs/emoji-styles/test.parquet,checkpoints/emoji-lite/test.parquet)
# More for `make train-tiny`, such as TRAIN_OPTIONS=compile_layers=true where there is a C++ compiler.
TRAIN_OPTIONS ?=
# One thread per test worker: more only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

KITS := $(VENV)/kits
NEWEST := .venv-newest

.PHONY: demo test test-slow test-newest test-quantization test-kits test-gpu check style data vae train-tiny \
	train-tiny-from-scratch evaluate-tiny ablations clean

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py

test: $(VENV)/.done $(VENV)/evaluation/.done
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(VENV)/.done
	$(PYTEST) -m slow

# The libraries that change most, as new as they are; without the upper bound that pyproject.toml sets. Apart from the
# rest, so that `make test` goes on with the versions of constraints.txt.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers diffusers peft datasets
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist loadfile

# Apart from the rest: where torchao is installed, every program that loads transformers prints its warnings.
test-quantization: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/quantization \
		torchao bitsandbytes -c constraints.txt
	PYTHONPATH=$(VENV)/quantization $(PYTEST) tests/integration/test_size.py

# Apart too, for the tests of FID, and without the torchvision that it asks for: one that was built for another torch
# than the one here would stop transformers.
$(VENV)/evaluation/.done: constraints.txt | $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/evaluation \
		torch-fidelity -c constraints.txt
	touch $@

# Apart from the rest: the kits are some 600 MB, and their import changes what other programs do.
test-kits: $(KITS)/.done
	MMAR_KITS=$(KITS) $(PYTEST) tests/integration/test_vlmevalkit.py tests/integration/test_lmms_eval.py

$(KITS)/.done: tests/kits.txt $(VENV)/.done
	rm -rf $(KITS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(KITS) -r tests/kits.txt
	touch $@

test-gpu: $(VENV)/.done
	$(PYTEST) -m gpu

# The folders lie inside `mmar` only where it is installed from a wheel; so imports and types are checked there.
check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder" build' EXIT && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target "$$folder" . && \
	cp pyproject.toml "$$folder" && cd "$$folder" && \
	$(CURDIR)/$(BIN)/lint-imports --no-logo --no-cache pyproject.toml && \
	$(CURDIR)/$(BIN)/basedpyright --level error --pythonpath $(CURDIR)/$(BIN)/python

style: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundled data, from the full set.
data: $(VENV)/.done
	$(BIN)/python -m mmar.training.emoji_rows $(EMOJI_STYLES) --out checkpoints/emoji-lite --lite

# mmar-tiny on all of emoji-styles: it goes on from TINY_START, a checkpoint, with a vocabulary for these rows and with
# its VAE; then its latent encoder learns words by itself, and all of it together once more, the animals and food more
# often. Each step goes on where it stopped; docs/runs.md has the times.
TINY_DATA := runs/emoji-styles
TINY_START ?= checkpoints/mmar-tiny
# recipe, model, data, latents if they are not the data's own, output
TINY_TRAIN = $(BIN)/mmar train $(1) model=$(2) data=$(3) \
	$(if $(4),latents=$(4)) output_dir=$(5) $(TRAIN_OPTIONS)
TINY_INIT = $(BIN)/python -m mmar.training.init_tiny --config configs/mmar-tiny --data $(TINY_DATA)/train.parquet
# rows, model, copies, output
TINY_LATENTS = $(BIN)/mmar cache-latents $(1) --model $(2) --num_copies $(3) --out $(4) --batch_size 256

$(TINY_DATA)/train.parquet: | $(VENV)/.done
	$(BIN)/python -m mmar.training.emoji_rows $(EMOJI_STYLES) --out $(TINY_DATA)

$(TINY_DATA)/test.parquet: | $(TINY_DATA)/train.parquet

runs/init/config.json: | $(TINY_DATA)/train.parquet
	$(TINY_INIT) --model $(TINY_START) --out runs/init

runs/latents/broken.json: | runs/init/config.json
	$(call TINY_LATENTS,$(TINY_DATA)/train.parquet,runs/init,12,runs/latents)

runs/latents-lite/broken.json: | runs/init/config.json
	$(call TINY_LATENTS,checkpoints/emoji-lite/train.parquet,runs/init,12,runs/latents-lite) --seed 1

runs/stage2/final/config.json: | runs/latents/broken.json
	$(call TINY_TRAIN,mmar_tiny_stage2,runs/init,$(TINY_DATA)/train.parquet,runs/latents,runs/stage2) \
		warmup_steps=300 'learning_rate_scales={}'

runs/reader/report.json: | runs/stage2/final/config.json
	$(BIN)/python -m mmar.training.train_latent_encoder runs/stage2/final --data $(TINY_DATA)/train.parquet \
		--latents runs/latents --eval_data $(TINY_DATA)/test.parquet --out runs/reader

train-tiny: | runs/reader/report.json runs/latents-lite/broken.json
	$(call TINY_TRAIN,mmar_tiny_stage2,runs/reader,configs/mmar-tiny/data.yaml,,runs/words) \
		seed=2 'task_weights=[0.35,0.6,0.05]' max_steps=20000
	$(BIN)/mmar export runs/words/final checkpoints/mmar-tiny --guidance_scale 2.0

# From scratch: VAE, untrained model, cached latents, three stages.
SCRATCH := runs/scratch
TRAIN_VAE = $(BIN)/python -m mmar.training.train_vae --config configs/mmar-tiny --data $(TINY_DATA)/train.parquet \
	--eval_data $(TINY_DATA)/test.parquet

$(SCRATCH)/vae_start/report.json: | $(TINY_DATA)/train.parquet
	$(TRAIN_VAE) --out $(SCRATCH)/vae_start --num_steps 15000 --num_views 32 --word_weight 0.3

# It draws well by then; the words take longer.
$(SCRATCH)/vae/report.json: | $(SCRATCH)/vae_start/report.json
	$(TRAIN_VAE) --start $(SCRATCH)/vae_start --out $(SCRATCH)/vae --num_steps 12000 --batch_size 8 --num_views 64 \
		--word_weight 0.5 --learning_rate 1.0e-3

vae: $(SCRATCH)/vae/report.json

$(SCRATCH)/init/config.json: | $(SCRATCH)/vae/report.json
	$(TINY_INIT) --vae $(SCRATCH)/vae --out $(SCRATCH)/init

$(SCRATCH)/latents/broken.json: | $(SCRATCH)/init/config.json
	$(call TINY_LATENTS,$(TINY_DATA)/train.parquet,$(SCRATCH)/init,8,$(SCRATCH)/latents)

# recipe, model, output
SCRATCH_TRAIN = $(call TINY_TRAIN,$(1),$(2),$(TINY_DATA)/train.parquet,$(SCRATCH)/latents,$(3))

train-tiny-from-scratch: | $(SCRATCH)/latents/broken.json
	$(call SCRATCH_TRAIN,mmar_tiny_stage1,$(SCRATCH)/init,$(SCRATCH)/stage1)
	$(call SCRATCH_TRAIN,mmar_tiny_stage2,$(SCRATCH)/stage1/final,$(SCRATCH)/stage2)
	$(call SCRATCH_TRAIN,mmar_tiny_stage3,$(SCRATCH)/stage2/final,$(SCRATCH)/stage3)
	$(BIN)/mmar export $(SCRATCH)/stage3/final checkpoints/mmar-tiny --guidance_scale 2.0

evaluate-tiny: $(VENV)/.done | $(TINY_TEST)
	$(BIN)/python -m mmar.evaluation.emoji_styles checkpoints/mmar-tiny --data $(TINY_TEST) \
		--out runs/evaluation --judge $(JUDGE)
	$(BIN)/mmar card checkpoints/mmar-tiny --facts configs/mmar-tiny/card.yaml \
		--evaluation runs/evaluation/result.json --repo_id checkpoints/mmar-tiny

# The paper's experiments in small, into docs/results. Hours on two cores; trials that are done are kept, and the one
# that was stopped goes on.
ABLATIONS := runs/ablations
# Of training. Without --num_steps it is the 4,000 of ablations/recipes/small.yaml.
EMOJI_STEPS ?= 1500
FASHION_STEPS ?= 1000
FASHION ?= ../shared/data/fashion-mnist
LITE := checkpoints/emoji-lite
ON_EMOJI = --config ablations/configs/emoji --data $(LITE)/train.parquet --test $(LITE)/test.parquet \
	--vae $(ABLATIONS)/emoji/vae --vq $(ABLATIONS)/emoji/vq --judge $(JUDGE) --work $(ABLATIONS)/emoji --out docs/results \
	--num_steps $(EMOJI_STEPS)
FASHION_JUDGE = -m mmar.ablations.fashion score --judge $(ABLATIONS)/fashion/judge.safetensors \
	--reference $(ABLATIONS)/fashion/test.parquet
ON_FASHION = --config ablations/configs/fashion --data $(ABLATIONS)/fashion/train.parquet \
	--test $(ABLATIONS)/fashion/test_small.parquet --vae $(ABLATIONS)/fashion/vae --vq $(ABLATIONS)/fashion/vq \
	--judge "$(FASHION_JUDGE)" --work $(ABLATIONS)/fashion --out docs/results --num_copies 0 \
	--num_steps $(FASHION_STEPS)

$(ABLATIONS)/emoji/vae/diffusion_pytorch_model.safetensors: | $(VENV)/.done
	$(BIN)/python -c "from mmar import MMARForConditionalGeneration as M; \
		M.from_pretrained('checkpoints/mmar-tiny').vae.save_pretrained('$(ABLATIONS)/emoji/vae')"

$(ABLATIONS)/fashion/judge.safetensors: | $(VENV)/.done
	$(BIN)/python -m mmar.ablations.fashion rows $(FASHION) --out $(ABLATIONS)/fashion --num_rows 12000 --num_test 300
	$(BIN)/python -m mmar.ablations.fashion judge --data $(ABLATIONS)/fashion/train.parquet --out $@

$(ABLATIONS)/fashion/vae/report.json: | $(ABLATIONS)/fashion/judge.safetensors
	$(BIN)/python -m mmar.training.train_vae --config ablations/configs/fashion --num_steps 6000 --word_weight 0 \
		--data $(ABLATIONS)/fashion/train.parquet --eval_data $(ABLATIONS)/fashion/test.parquet --out $(@D)

$(ABLATIONS)/%/vq/report.json: | $(ABLATIONS)/emoji/vae/diffusion_pytorch_model.safetensors $(ABLATIONS)/fashion/vae/report.json
	$(BIN)/python -m mmar.ablations.train_vq --start $(ABLATIONS)/$*/vae --out $(@D) \
		--data $(if $(filter emoji,$*),$(LITE),$(ABLATIONS)/fashion)/train.parquet

ablations: | $(ABLATIONS)/emoji/vq/report.json $(ABLATIONS)/fashion/vq/report.json
	$(BIN)/python -m mmar.ablations.table3 $(ON_EMOJI)
	$(BIN)/python -m mmar.ablations.noise_levels $(ON_EMOJI)
	$(BIN)/python -m mmar.ablations.first_timestep $(ON_EMOJI)
	$(BIN)/python -m mmar.ablations.table3 $(ON_FASHION)
	$(BIN)/python -m mmar.ablations.noise_levels $(ON_FASHION)
	$(BIN)/python -m mmar.ablations.first_timestep $(ON_FASHION)
	$(BIN)/python -m mmar.ablations.scaling $(ON_FASHION)
	$(BIN)/python -m mmar.ablations.stage2 $(ON_FASHION)
	$(BIN)/python -m mmar.ablations.cfg_sweep checkpoints/mmar-tiny --data $(LITE)/test.parquet --judge $(JUDGE) \
		--work $(ABLATIONS)/cfg --out docs/results
	$(BIN)/python -m mmar.ablations.chessboard --work $(ABLATIONS)/chessboard --out docs/results
	$(BIN)/python -m mmar.ablations.numerical_error --model checkpoints/mmar-tiny --data $(LITE)/train.parquet \
		--out docs/results

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) demo_output build dist *.egg-info

"""MMARPipeline in process: diffusers' conventions, and what bad input gets."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, make_pipeline
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.utils import logging as diffusers_logging
from helpers import tiny_arguments
from PIL import Image
from transformers import AutoModel, pipeline

from mmar import MMARConfig, MMARForConditionalGeneration, MMARPipeline, MMARPipelineOutput
from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig, MMARTransfusionForConditionalGeneration
from mmar.modeling_mmar import saving_mmar
from mmar.modeling_mmar.saving_mmar import weights_files


PROMPT, OTHER = "a red square", "a square that is green, and quite a bit longer to describe"
# Pictures of one batch and alone come from matrix products of other shapes, which sum in another order: relative
# errors of 1e-7 each, over 4 x 5 steps with guidance 3, on latents of about 1.
BATCH_TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **kwargs).images


# ------------------------------------------------------------------------------------------------------- pictures


def test_output_types(pipe):
    size = pipe.model.config.image_size
    as_tensor = pipe(PROMPT, generator=seeded(), output_type="pt").images
    assert as_tensor.shape == (1, 3, size, size) and 0 <= as_tensor.min() and as_tensor.max() <= 1
    as_array = pipe(PROMPT, generator=seeded(), output_type="np").images
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    (image,) = pipe(PROMPT, generator=seeded()).images
    assert isinstance(image, Image.Image) and image.size == (size, size)
    np.testing.assert_array_equal(np.asarray(image), np.rint(as_array[0] * 255).astype(np.uint8))
    drawn = latents(pipe, PROMPT, generator=seeded())
    decoded = pipe.processor.postprocess(pipe.model.decode_latents(drawn), "pt")
    assert torch.equal(decoded, as_tensor)


def test_output_class_and_tuple(pipe):
    output = pipe(PROMPT, generator=seeded(), output_type="latent")
    assert isinstance(output, MMARPipelineOutput)
    as_tuple = pipe(PROMPT, generator=seeded(), output_type="latent", return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.images)


def test_defaults_come_from_the_config(pipe):
    defaults = pipe.model.config.image_generation
    assert torch.equal(
        latents(pipe, PROMPT, generator=seeded()), latents(pipe, PROMPT, generator=seeded(), **defaults)
    )
    assert pipe.guidance_scale == defaults["guidance_scale"] and pipe.do_classifier_free_guidance
    assert pipe.num_timesteps == defaults["num_ar_steps"]


def test_presets(pipe):
    num_latents = pipe.model.config.num_latents
    fast = latents(pipe, PROMPT, generator=seeded(), preset="fast")
    assert pipe.num_timesteps == num_latents // 8
    own = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    kept, pipe.scheduler = pipe.scheduler, own
    try:
        same = latents(pipe, PROMPT, generator=seeded(), num_ar_steps=num_latents // 8, num_inference_steps=10)
    finally:
        pipe.scheduler = kept
    assert torch.equal(fast, same)
    assert not torch.equal(fast, latents(pipe, PROMPT, generator=seeded()))


def test_each_way_to_spend_less_reaches_the_model(pipe):
    """Each reaches the model and changes the picture."""
    settings = {"num_ar_steps": 2, "num_inference_steps": 4}
    plain = latents(pipe, PROMPT, generator=seeded(), **settings)
    for argument in ({"order": "raster"}, {"guidance_interval": (0.5, 1.0)}, {"num_inference_steps": (4, 2)}):
        assert not torch.equal(latents(pipe, PROMPT, generator=seeded(), **settings | argument), plain)
    unmerged = latents(pipe, PROMPT, generator=seeded(), **settings, fast=False)
    torch.testing.assert_close(unmerged, plain, **BATCH_TOLERANCE)


def test_one_prompt_in_a_list_is_the_prompt(pipe):
    assert torch.equal(latents(pipe, [PROMPT], generator=seeded()), latents(pipe, PROMPT, generator=seeded()))


def test_a_seed_is_one_image(pipe):
    """Kept from a list of seeds, and drawn again by itself, in each way to say so."""
    generators = [seeded(seed) for seed in range(4)]
    batch = latents(pipe, [PROMPT, OTHER], num_images_per_prompt=2, generator=generators)
    alone = [latents(pipe, prompt, generator=seeded(seed)) for seed, prompt in enumerate([PROMPT] * 2 + [OTHER] * 2)]
    listed = [latents(pipe, [prompt], generator=[seeded(seed)]) for seed, prompt in ((0, PROMPT), (3, OTHER))]
    assert torch.equal(alone[0], listed[0]) and torch.equal(alone[3], listed[1])
    torch.testing.assert_close(batch, torch.cat(alone), **BATCH_TOLERANCE)
    # Not because all pictures are one.
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_another_thread_draws_by_settings_of_its_own(pipe, monkeypatch):
    """Here within the call, between its checks and its drawing."""
    settings = {"guidance_scale": 3.0, "num_ar_steps": 4, "num_inference_steps": 3}
    expected = latents(pipe, PROMPT, generator=seeded(), **settings)
    read = pipe.processor.generation_inputs

    def read_late(*args):
        monkeypatch.undo()
        latents(pipe, OTHER, guidance_scale=1.0, num_ar_steps=2, num_inference_steps=3)
        return read(*args)

    monkeypatch.setattr(pipe.processor, "generation_inputs", read_late)
    assert torch.equal(latents(pipe, PROMPT, generator=seeded(), **settings), expected)


def test_a_generator_draws_different_pictures(pipe):
    first, second = latents(pipe, PROMPT, num_images_per_prompt=2, generator=seeded())
    assert (first - second).abs().max() > 0.1


def test_the_first_picture_does_not_depend_on_how_many_follow(pipe):
    one = latents(pipe, PROMPT, generator=seeded())
    three = latents(pipe, PROMPT, num_images_per_prompt=3, generator=seeded())
    torch.testing.assert_close(three[:1], one, **BATCH_TOLERANCE)


def test_negative_prompt(pipe):
    plain = latents(pipe, PROMPT, generator=[seeded()])
    assert torch.equal(latents(pipe, PROMPT, negative_prompt="", generator=[seeded()]), plain)
    negative = latents(pipe, PROMPT, negative_prompt="blue", generator=[seeded()])
    assert (negative - plain).abs().max() > 1e-3
    unguided = latents(pipe, PROMPT, guidance_scale=1.0, generator=[seeded()])
    assert torch.equal(
        latents(pipe, PROMPT, negative_prompt="blue", guidance_scale=1.0, generator=[seeded()]), unguided
    )
    each = latents(pipe, [PROMPT] * 2, negative_prompt=["blue", None], generator=[seeded(), seeded()])
    torch.testing.assert_close(each, torch.cat([negative, plain]), **BATCH_TOLERANCE)


def test_unconditional(pipe):
    """Prompt and null prompt are the same, and guidance cancels out."""
    nothing = latents(pipe, generator=seeded())
    assert torch.equal(nothing, latents(pipe, "", generator=seeded()))
    assert torch.equal(nothing, latents(pipe, [None], generator=seeded()))
    # v_u + w (v_c - v_u) with both rows of one batch: equal but for rounding.
    torch.testing.assert_close(nothing, latents(pipe, guidance_scale=1.0, generator=seeded()), **BATCH_TOLERANCE)


def test_known_latents_stay(pipe):
    config = pipe.model.config
    size = config.latent_size
    known = torch.randn(1, config.latent_channels, size, size, generator=seeded(1))
    mask = torch.arange(config.num_latents)[None] < 5
    drawn = latents(pipe, PROMPT, latents=known, latent_mask=mask, generator=seeded())
    assert torch.equal(drawn.flatten(2)[:, :, 5:], known.flatten(2)[:, :, 5:])
    assert (drawn.flatten(2)[:, :, :5] != known.flatten(2)[:, :, :5]).all()


# ---------------------------------------------------------------------------------------------- callback, progress


def test_callback_sees_the_partial_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, callback_kwargs):
        assert pipeline is pipe and timestep == step
        seen.append((step, callback_kwargs["latents"], callback_kwargs["latent_mask"]))

    names = ["latents", "latent_mask"]
    drawn = latents(
        pipe, PROMPT, generator=seeded(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    for _, partial, mask in seen:
        known = ~mask[0]
        assert torch.equal(partial.flatten(2)[:, :, known], drawn.flatten(2)[:, :, known])
        assert (partial.flatten(2)[:, :, ~known] == 0).all()
    num_hidden = [int(mask.sum()) for _, _, mask in seen]
    assert num_hidden == sorted(num_hidden, reverse=True) and num_hidden[-1] == 0


def test_callback_changes_the_latents(pipe):
    def callback(pipeline, step, timestep, callback_kwargs):
        return {"latents": torch.ones_like(callback_kwargs["latents"])} if step == 3 else callback_kwargs

    drawn = latents(pipe, PROMPT, generator=seeded(), callback_on_step_end=callback)
    assert torch.equal(drawn, torch.ones_like(drawn))


def test_callback_changes_the_guidance(pipe):
    """As callbacks of dynamic guidance do in diffusers."""

    def turn_off(pipeline, step, timestep, callback_kwargs):
        if step == 1:
            pipeline._guidance_scale = 0.0
        return callback_kwargs

    drawn = latents(pipe, PROMPT, guidance_scale=3.0, generator=seeded(), callback_on_step_end=turn_off)
    assert pipe.guidance_scale == 0.0 and not pipe.do_classifier_free_guidance
    inputs = pipe.processor.generation_inputs([PROMPT], [""])
    expected = pipe.model.generate_images(
        **inputs,
        guidance_scale=3.0,
        generator=seeded(),
        callback=lambda step, *args: {"guidance_scale": 1.0} if step == 1 else None,
        output_type="latent",
    )
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, latents(pipe, PROMPT, guidance_scale=3.0, generator=seeded()))


def test_diffusers_callbacks_say_what_they_take(pipe):
    class Countdown(PipelineCallback):
        tensor_inputs = ["latent_mask", "latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            left.append(int(callback_kwargs["latent_mask"].sum()))
            return callback_kwargs

    left, expected = [], latents(pipe, PROMPT, generator=seeded())
    assert torch.equal(latents(pipe, PROMPT, generator=seeded(), callback_on_step_end=Countdown()), expected)
    assert left[-1] == 0 and len(left) == 4
    latents(pipe, PROMPT, generator=seeded(), callback_on_step_end=MultiPipelineCallbacks([Countdown(), Countdown()]))
    assert len(left) == 12
    with pytest.raises(ValueError, match="latent_mask"):
        pipe(PROMPT, callback_on_step_end=SDCFGCutoffCallback())


def test_interrupt_returns_what_is_drawn(pipe):
    partial = []

    def callback(pipeline, step, timestep, callback_kwargs):
        partial.append(callback_kwargs["latents"])
        pipeline._interrupt = step == 1
        return {}

    drawn = latents(pipe, PROMPT, generator=seeded(), callback_on_step_end=callback)
    assert len(partial) == 2 and torch.equal(drawn, partial[-1])
    assert torch.isfinite(latents(pipe, PROMPT, generator=seeded())).all() and not pipe.interrupt


def test_interrupt_keeps_the_latents_that_the_callback_changed(pipe):
    def callback(pipeline, step, timestep, callback_kwargs):
        pipeline._interrupt = True
        return {"latents": torch.ones_like(callback_kwargs["latents"])}

    drawn = latents(pipe, PROMPT, generator=seeded(), callback_on_step_end=callback)
    assert torch.equal(drawn, torch.ones_like(drawn))


def test_progress_bar(capfd):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(desc="drawing")
    pipe(PROMPT, num_ar_steps=3, generator=seeded(), output_type="latent")
    shown = capfd.readouterr().err
    assert "drawing: 100%" in shown and "3/3" in shown
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, generator=seeded(), output_type="latent")
    assert capfd.readouterr().err == ""


def test_steps_of_a_model_that_draws_in_one_round(pipe, capfd):
    """They are the diffusion steps: of the bar, and of callbacks of diffusers, which stop at a share of them."""
    processor = pipe.processor
    config = MMARTransfusionConfig(
        **tiny_arguments(
            text_config={"vocab_size": len(processor.tokenizer)},
            diffusion_config={"prediction_type": "epsilon"},
            image_token_id=processor.image_token_id,
        )
    )
    model = MMARTransfusionForConditionalGeneration._from_config(config).eval()
    drawing, seen = MMARPipeline(model, processor, model.default_scheduler()), []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, pipe.num_timesteps))
        return kwargs

    drawing(PROMPT, num_inference_steps=7, generator=seeded(), output_type="latent", callback_on_step_end=callback)
    assert seen == [(step, 7) for step in range(7)]
    assert "7/7" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- scheduler, device, dtype


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_scheduler_is_swappable(scheduler_class):
    pipe = make_pipeline()
    before = latents(pipe, PROMPT, generator=seeded())
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    assert pipe.config["scheduler"] == ("diffusers", scheduler_class.__name__)
    after = latents(pipe, PROMPT, generator=seeded())
    assert torch.isfinite(after).all()
    assert torch.equal(after, before) == (scheduler_class is DDPMScheduler)


def test_swapped_scheduler_is_saved(tmp_path):
    pipe = make_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = MMARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, DPMSolverMultistepScheduler)
    assert torch.equal(latents(loaded, PROMPT, generator=seeded()), latents(pipe, PROMPT, generator=seeded()))


def test_a_compiled_model_draws_and_is_saved_as_itself(pipe, tmp_path):
    expected = latents(pipe, PROMPT, generator=seeded())
    compiled = MMARPipeline(**pipe.components | {"model": torch.compile(pipe.model, backend="eager")})
    torch.testing.assert_close(latents(compiled, PROMPT, generator=seeded()), expected)
    compiled.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["model"] == ["transformers", "MMARForConditionalGeneration"]
    reopened = MMARPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(latents(reopened, PROMPT, generator=seeded()), expected)


def test_casting_keeps_vae_and_positions_in_float32():
    pipe = make_pipeline().to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert pipe.model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in pipe.model.vae.parameters()} == {torch.float32}
    assert pipe.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert pipe(PROMPT, generator=seeded(), output_type="pt").images.dtype == torch.float32
    back = pipe.to("cpu", torch.float32)
    assert back.dtype == torch.float32


def test_offloading(pipe, monkeypatch):
    """With the CPU as the accelerator: the hooks run, and the picture is the same, twice."""
    offloaded = make_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    hook_class, fetched = type(offloaded.model._hf_hook), []
    pre_forward = hook_class.pre_forward

    def spy(hook, module, *args, **kwargs):
        fetched.append(module)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(hook_class, "pre_forward", spy)
    expected = pipe(PROMPT, generator=seeded(), output_type="pt").images
    for _ in range(2):
        fetched.clear()
        assert torch.equal(offloaded(PROMPT, generator=seeded(), output_type="pt").images, expected)
        assert offloaded.model in fetched


def test_offloading_without_an_accelerator():
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="accelerator"):
        make_pipeline().enable_model_cpu_offload()


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a string, a list of strings or None; got <class 'int'>"),
        ({"prompt": []}, "`prompt` must hold at least one prompt"),
        ({"prompt": [PROMPT, 3]}, "`prompt` must be a string"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable; got 3"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names; got 'latents'"),
        ({"guidance_scale": "3"}, "`guidance_scale` must be a number or None; got '3'"),
        ({"latents": [0.0]}, "`latents` must be a torch tensor with a batch axis; got list"),
        ({"latent_mask": 1}, "`latent_mask` must be a torch tensor with a batch axis; got int"),
        ({"negative_prompt": 3}, "`negative_prompt` must be a string"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` must be one string or as many as `prompt`, 1; got 2"),
        ({"prompt": "long " * 500}, "must have at most 512 positions"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer of at least 1; got 0"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be an integer"),
        ({"generator": [torch.Generator()] * 3}, "1 prompts x 1 pictures = 1; got 3"),
        ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent; got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, "may hold latents, latent_mask; got z"),
        ({"callback_on_step_end_tensor_inputs": [3]}, "may hold latents, latent_mask; got 3"),
        ({"num_ar_steps": 0}, "`num_ar_steps` must be between 1 and 16"),
        ({"num_ar_steps": 17}, "`num_ar_steps` must be between 1 and 16"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be between 1 and 1000"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` must be between 1 and 1000"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "`latents` and `latent_mask` together"),
        (
            {"callback_on_step_end": lambda *args: {"latents": torch.zeros(1)}},
            "`latents` as a tensor",
        ),
        ({"callback_on_step_end": lambda *args: 5}, "must return None or a dict; got int"),
        ({"callback_on_step_end": lambda *args: {"latents": [0.0]}}, "that it was given; got list"),
        (
            {"callback_on_step_end": lambda pipe, step, _, values: {"latents": values["latents"] * torch.nan}},
            "finite `latents`",
        ),
    ],
)
def test_bad_arguments(pipe, kwargs, message):
    with pytest.raises(ValueError) as error:
        pipe(**({"prompt": PROMPT, "generator": seeded()} | kwargs))
    assert message in str(error.value)


def test_scheduler_of_another_prediction_type():
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="`prediction_type`"):
        pipe(PROMPT)


def test_save_formats_that_are_refused(pipe, tmp_path):
    for kwargs in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match="`safe_serialization`.*`variant`"):
            pipe.save_pretrained(tmp_path, **kwargs)


@pytest.fixture
def folder(hub_root, tmp_path):
    return shutil.copytree(hub_root / REPO, tmp_path / "copy")


@pytest.mark.parametrize("opener", [MMARPipeline, AutoModel, MMARForConditionalGeneration])
def test_folder_without_weights(folder, opener):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        opener.from_pretrained(folder)


def test_folder_without_a_shard(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="300KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        MMARPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors"):
        MMARPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_truncated_tokenizer(folder, name):
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="tokenizer"):
        MMARPipeline.from_pretrained(folder)


def test_weights_without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["vae.decoder.conv_in.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="vae.decoder.conv_in.weight"):
        MMARPipeline.from_pretrained(folder)


def test_remote_code_needs_trust(hub_root):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(hub_root / REPO)


# ----------------------------------------------------------------------------------------------- the other pipelines


def test_transformers_pipeline_batches(pipe, hub_root):
    drawer = pipeline("text-to-image", model=str(hub_root / REPO))
    assert type(drawer.model) is MMARForConditionalGeneration
    alone = drawer(PROMPT, generator=seeded(), output_type="pt")
    assert torch.equal(drawer(PROMPT, generator=[seeded()], output_type="pt"), alone)
    assert torch.equal(alone, pipe(PROMPT, generator=seeded(), output_type="pt").images[0])
    assert isinstance(drawer(PROMPT, generator=seeded()), Image.Image)
    first, second = drawer([PROMPT, OTHER], batch_size=2, generator=seeded(), output_type="pt")
    expected = pipe([PROMPT, OTHER], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(torch.stack([first, second]), expected, **BATCH_TOLERANCE)
    listed = drawer([PROMPT, OTHER], generator=[seeded(1), seeded(2)], output_type="pt")
    expected = pipe([PROMPT, OTHER], generator=[seeded(1), seeded(2)], output_type="pt").images
    torch.testing.assert_close(torch.stack(listed), expected, **BATCH_TOLERANCE)


def test_transformers_pipeline_arguments(hub_root):
    drawer = pipeline("text-to-image", model=str(hub_root / REPO), num_ar_steps=2)
    for kwargs, message in (
        ({"steps": 3}, "steps"),
        ({"output_type": "latent"}, "`output_type`"),
        ({"generator": [seeded(), seeded()]}, "`generator`"),
        ({"num_ar_steps": 17}, "between 1 and 16"),
    ):
        with pytest.raises(ValueError, match=message):
            drawer(PROMPT, **kwargs)


def test_transformers_pipeline_saves_a_folder_that_opens(hub_root, tmp_path):
    drawer = pipeline("text-to-image", model=str(hub_root / REPO))
    drawer.save_pretrained(tmp_path)
    again = pipeline("text-to-image", model=str(tmp_path))
    kwargs = {"output_type": "pt"}
    assert torch.equal(again(PROMPT, generator=seeded(), **kwargs), drawer(PROMPT, generator=seeded(), **kwargs))


def test_height_and_width_are_the_models_own(pipe, hub_root):
    size, inputs = pipe.model.config.image_size, pipe.processor.generation_inputs([PROMPT], [""])
    drawer = pipeline("text-to-image", model=str(hub_root / REPO))
    doors = {
        "diffusers": lambda **kwargs: pipe(PROMPT, generator=seeded(), output_type="pt", **kwargs).images[0],
        "text-to-image": lambda **kwargs: drawer(PROMPT, generator=seeded(), output_type="pt", **kwargs),
        "generate_images": lambda **kwargs: pipe.model.generate_images(**inputs, generator=seeded(), **kwargs),
        "generate": lambda **kwargs: pipe.model.generate(
            **inputs, generator=seeded(), generation_mode="image", **kwargs
        ),
    }
    for name, door in doors.items():
        assert torch.equal(door(height=size, width=size), door()), name
        for wrong in ({"height": 2 * size}, {"width": size - 1}, {"height": str(size)}, {"width": True}):
            with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
                door(**wrong)


def test_any_to_any(hub_root, monkeypatch):
    """Its demand for torchvision is not ours: without it, the demand is lifted here."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
    both = pipeline("any-to-any", model=str(hub_root / REPO))
    chat = [{"role": "user", "content": [{"type": "text", "text": f"Generate an image: {PROMPT}"}]}]
    output = both(chat, generation_mode="image", generate_kwargs={"generator": seeded()})
    expected = pipeline("text-to-image", model=str(hub_root / REPO))(PROMPT, generator=seeded())
    assert output[0]["generated_image"].tobytes() == expected.tobytes()
    content = [{"type": "image", "image": expected}, {"type": "text", "text": "Which colour?"}]
    chat, options = [{"role": "user", "content": content}], {"max_new_tokens": 3, "return_full_text": False}
    asked = pipeline("image-text-to-text", model=str(hub_root / REPO))(text=chat, **options)
    assert both(chat, **options)[0]["generated_text"] == asked[0]["generated_text"] != ""


# ------------------------------------------------------------------------------------------------- folder and code


def test_every_exported_module_is_listed():
    """The exporter's list against the folders."""
    root = Path(saving_mmar.__file__).parent.parent
    found = {
        folder: tuple(sorted(path.stem for path in (root / folder).glob("*_mmar.py")))
        for folder in saving_mmar.REMOTE_MODULES
    }
    assert found == {folder: tuple(sorted(names)) for folder, names in saving_mmar.REMOTE_MODULES.items()}


def test_the_model_imports_no_other_folder():
    folder = Path(saving_mmar.__file__).parent
    lines = {path.name: re.findall(r"^\s*from \.\..*", path.read_text(), re.MULTILINE) for path in folder.glob("*.py")}
    assert not any(lines.values()), lines


def test_exported_code_names_no_circle(hub_root):
    """diffusers follows names from file to file and would not come back."""
    from transformers.dynamic_module_utils import get_relative_imports

    folder = hub_root / REPO
    names = {path.stem: set(get_relative_imports(path)) for path in folder.glob("*.py")}
    assert names[saving_mmar.ENTRY_MODULE] == names.keys() - {saving_mmar.ENTRY_MODULE}
    while leaves := {name for name, needed in names.items() if not needed}:
        names = {name: needed - leaves for name, needed in names.items() if name not in leaves}
    assert names == {}


def test_no_weight_is_stored_twice(hub_root):
    weights = [path for path in (hub_root / REPO).rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    assert [path.name for path in weights] == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(weights[0], "pt") as file:
        assert "lm_head.weight" not in file.keys()
        assert "model.language_model.embed_tokens.weight" in file.keys()


def test_config_drops_custom_pipelines_and_writes_them(hub_root, tmp_path):
    config = MMARConfig.from_pretrained(hub_root / REPO)
    assert not hasattr(config, "custom_pipelines")
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (hub_root / REPO / "config.json").read_bytes()
    assert "text-to-image" in json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]


def test_components_can_be_passed(pipe, hub_root):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    loaded = MMARPipeline.from_pretrained(hub_root / REPO, model=pipe.model, scheduler=scheduler)
    assert loaded.model is pipe.model and loaded.scheduler is scheduler


def test_no_warnings_when_loading(hub_root, capfd):
    diffusers_logging.set_verbosity_warning()
    MMARPipeline.from_pretrained(hub_root / REPO)
    # Bars tell what takes longer than a second as s/it.
    lines = capfd.readouterr().err.splitlines()
    shown = [line for line in lines if line.strip() and not re.search("it/s|s/it", line)]
    assert shown == []


def test_scheduler_and_model_of_another_kind_are_refused(pipe):
    for scheduler in (None, "ddim"):
        with pytest.raises(ValueError, match="`scheduler`"):
            MMARPipeline(pipe.model, pipe.processor, scheduler)
    with pytest.raises(ValueError, match="`model`"):
        MMARPipeline(pipe.model.model, pipe.processor, pipe.scheduler)


def test_the_null_prompt_is_that_of_the_processor(hub_root):
    pipe = MMARPipeline.from_pretrained(hub_root / REPO)
    pipe.processor.null_prompt = "Draw."
    again = MMARPipeline(pipe.model, pipe.processor, pipe.scheduler)
    assert again.model.config.null_prompt_ids == pipe.processor.generation_inputs([None]).input_ids[0].tolist()


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        MMARForConditionalGeneration.from_pretrained(folder)


def test_broken_index(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="300KB")
    index = tmp_path / "model.safetensors.index.json"
    for text in (index.read_text()[:50], "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="weights files"):
            MMARPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"subfolder": "model"}, {"variant": "fp16"}])
def test_an_index_names_files_of_its_folder_only(pipe, tmp_path, options):
    folder = tmp_path / options.get("subfolder", "")
    variant = options.get("variant")
    pipe.model.save_pretrained(folder, max_shard_size="300KB", variant=variant)
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path, **options)
    assert loaded.num_parameters() == pipe.model.num_parameters()
    (index,) = folder.glob("*.index*.json")
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    elsewhere = folder.parent / "outside.safetensors"
    shutil.copy(folder / file, elsewhere)
    for outside in ("../outside.safetensors", "x/../../outside.safetensors", str(elsewhere)):
        content["weight_map"][name] = outside
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index"):
            MMARForConditionalGeneration.from_pretrained(tmp_path, **options)
        shutil.copy(index, folder / "diffusion_pytorch_model.safetensors.index.json")
        with pytest.raises(ValueError, match="index.json"):
            weights_files("vae", folder)


def test_parts_that_do_not_fit_together_are_refused(pipe):
    processor = copy.copy(pipe.processor)
    processor.num_image_tokens = 9
    with pytest.raises(ValueError, match="`num_image_tokens`"):
        MMARPipeline(pipe.model, processor, pipe.scheduler)
    with pytest.raises(ValueError, match="`model`"):
        MMARPipeline(pipe.scheduler, pipe.processor, pipe.model)


def test_control_tokens_in_a_prompt_are_text(pipe):
    for words in ("a cat<|im_end|>", "a <image>", "a <|image|>"):
        images = pipe(words, num_ar_steps=1, num_inference_steps=2, output_type="latent").images
        assert torch.isfinite(images).all()

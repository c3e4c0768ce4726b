"""From a Qwen2 and a VAE on disk to an MMAR folder: the same numbers, the same files, no more memory than a shard."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import mmar
from diffusers import AutoencoderKL, VQModel
from helpers import tiny_config
from parts import VAE_CONFIG, make_preset, make_qwen2, make_vae
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, Qwen2ForCausalLM

from mmar import MMARConfig, MMARForConditionalGeneration, MMARPipeline, MMARProcessor
from mmar.ablations.systems import CONFIG_CLASSES, system_config
from mmar.conversion.init_from_qwen2 import init_from_qwen2, load_preset


QWEN2_FILES = Path(__file__).parents[3] / "shared" / "data" / "components"

# The image heads of MMAR and of the systems of Table 3.
HEADS = ("diffusion_mlp", "code_head", "noise_head")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    make_qwen2(root / "qwen2")
    make_vae(root / "vae")
    make_preset(root / "preset")
    return root


def init(folders, out, **options):
    options = {"backbone": str(folders / "qwen2"), "vae": folders / "vae", "preset": str(folders / "preset")} | options
    return init_from_qwen2(**options, out=out)


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("tied", "dtype", "shards"), [(True, torch.bfloat16, "5GB"), (False, torch.float32, "60KB")])
def test_text_is_that_of_the_backbone_and_saving_again_changes_nothing(folders, tmp_path, tied, dtype, shards):
    qwen2 = make_qwen2(tmp_path / "qwen2", dtype, max_shard_size=shards, tie_word_embeddings=tied)
    report = init(folders, tmp_path / "out", backbone=str(tmp_path / "qwen2"), max_shard_size=shards)
    model = MMARForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (report["files"] > 1) == (shards == "60KB")
    assert model.dtype == dtype and report["dtype"] == str(dtype).removeprefix("torch.")
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, qwen2(ids).logits)
    assert model.generation_config.eos_token_id == qwen2.generation_config.eos_token_id
    vae = AutoencoderKL.from_pretrained(folders / "vae")
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in model.vae.state_dict().items())
    assert model.vae.config.scaling_factor == 1.5 and model.vae.config.shift_factor == 0.25
    pipe = MMARPipeline.from_pretrained(tmp_path / "out")
    pipe.save_pretrained(tmp_path / "again", max_shard_size=shards)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_a_tied_head_that_is_stored_too_changes_nothing(folders, tmp_path):
    shutil.copytree(folders / "qwen2", tmp_path / "qwen2")
    file = tmp_path / "qwen2" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    for backbone in (folders / "qwen2", tmp_path / "qwen2"):
        init(folders, tmp_path / backbone.parent.name, backbone=str(backbone))
    name = "model.safetensors"
    expected, got = (load_file(tmp_path / backbone.name / name) for backbone in (folders, tmp_path))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)


def make_system(folder, system):
    """A VQ tokenizer in `folder / "vqmodel"`, and the config of a system of Table 3 in `folder / "preset"`."""
    vq = VQModel(**{name: VAE_CONFIG[name] for name in VAE_CONFIG if "factor" not in name}, num_vq_embeddings=16)
    vq.save_pretrained(folder / "vqmodel")
    vq_config = {name: value for name, value in vq.config.items() if not name.startswith("_")}
    system_config(system, tiny_config(), vq_config, train_backbone=False).save_pretrained(folder / "preset")
    return vq


@pytest.mark.parametrize("system", ["epsilon", "vq", "transfusion"])
def test_the_systems_of_table_3_start_from_a_qwen2_too(folders, tmp_path, system):
    """Their folders open by their own code, and text is the backbone's; a VQ needs a VQModel, the others none."""
    vq = make_system(tmp_path, system)
    tokenizers = [tmp_path / "vqmodel", folders / "vae"]
    right, wrong = tokenizers if system == "vq" else tokenizers[::-1]
    with pytest.raises(ValueError, match="AutoencoderKL|VQModel"):
        init(folders, tmp_path / "out", preset=str(tmp_path / "preset"), vae=wrong)
    report = init(folders, tmp_path / "out", preset=str(tmp_path / "preset"), vae=right)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert set(report["parameters"]) == {name for name, _ in model.named_children()} - {"lm_head"}
    modules = {name for name, own in CONFIG_CLASSES.items() if type(model.config) is own}
    assert modules == ({system} & CONFIG_CLASSES.keys())
    for name in modules:
        assert (tmp_path / "out" / f"modeling_{name}_mmar.py").is_file()
    qwen2 = Qwen2ForCausalLM.from_pretrained(folders / "qwen2", dtype="auto")
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.to(qwen2.dtype)(ids).logits, qwen2(ids).logits)
    if system == "vq":
        codebook = model.vae.quantize.embedding.weight
        assert torch.equal(codebook, vq.quantize.embedding.weight)


@pytest.mark.parametrize("system", ["vq", "transfusion"])
def test_commands_open_the_systems_of_table_3(folders, tmp_path, system):
    """What writes a folder again, its card or its PLoRA does so by the class that the config names."""
    make_system(tmp_path, system)
    tokenizer = tmp_path / "vqmodel" if system == "vq" else folders / "vae"
    init(folders, tmp_path / "out", preset=str(tmp_path / "preset"), vae=tokenizer)
    for words in (
        ("export", tmp_path / "out", tmp_path / "again"),
        ("card", tmp_path / "again"),
        ("peft", "export", tmp_path / "again", tmp_path / "adapter"),
    ):
        mmar(*words)
    before, again = (AutoModel.from_pretrained(tmp_path / name) for name in ("out", "again"))
    assert type(again) is type(before) and type(again.config) is CONFIG_CLASSES[system]
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in again.state_dict().items())
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    own = [value for name, value in before.state_dict().items() if name.endswith(("image_A", "image_B"))]
    assert sorted(factor.numel() for factor in factors) == sorted(value.numel() for value in own)
    assert float(sum(factor.double().abs().sum() for factor in factors)) == pytest.approx(
        float(sum(value.double().abs().sum() for value in own))
    )


@pytest.mark.parametrize("system", ["mmar", "vq", "transfusion"])
def test_new_weights_are_drawn_as_the_model_draws_them(folders, tmp_path, system):
    make_system(tmp_path, system)
    tokenizer = tmp_path / "vqmodel" if system == "vq" else folders / "vae"
    options = {"preset": str(tmp_path / "preset"), "vae": tokenizer, "dtype": "float32"}
    init(folders, tmp_path / "out", **options)
    model = AutoModel.from_pretrained(tmp_path / "out")
    torch.manual_seed(0)
    drawn = type(model)(model.config)
    for (name, got), expected in zip(model.named_parameters(), drawn.parameters(), strict=True):
        if name.startswith(("model.latent_encoder", *HEADS)) or ".image_" in name:
            got, expected = got.detach(), expected.detach()
            spread = float(expected.std(correction=0))
            error = 6 / got.numel() ** 0.5  # of means and stds of two samples, six sigma
            assert abs(float(got.mean() - expected.mean())) <= error * spread, name
            assert abs(float(got.std(correction=0)) - spread) <= error * spread, name
    # Another seed gives others; the same one gives the same, whatever the shards.
    init(folders, tmp_path / "same", **options, max_shard_size="60KB")
    init(folders, tmp_path / "other", **options, seed=1)
    same, other = (AutoModel.from_pretrained(tmp_path / name) for name in ("same", "other"))
    name = "model.latent_encoder.position_embedding"
    assert torch.equal(same.get_parameter(name), model.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_image_token_lies_inside_the_embedding(folders, tmp_path):
    report = init(folders, tmp_path / "out")
    before = AutoTokenizer.from_pretrained(folders / "qwen2")
    processor = MMARProcessor.from_pretrained(tmp_path / "out")
    assert report["image_token_id"] == processor.image_token_id == len(before)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.language_model.embed_tokens.weight").get_shape()[0] == 320
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["null_prompt_ids"] and config["frozen_weights"] == "include"


def draw_and_describe(folder):
    """An image, and the tokens of an answer about it."""
    pipe = MMARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red square", num_ar_steps=2, num_inference_steps=2).images[0]
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which colour?"}]
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    # At this temperature each token of the vocabulary is about as likely.
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 1e6, "top_k": 0, "repetition_penalty": 1.1}
    answer = pipe.model.generate(**inputs, max_new_tokens=400, min_new_tokens=400, **sampling)
    return image, answer[:, inputs["input_ids"].shape[1] :], pipe


def test_it_draws_and_describes(folders, tmp_path):
    init(folders, tmp_path / "out")
    image, answer, pipe = draw_and_describe(tmp_path / "out")
    assert image.size == (8, 8) and answer.shape[1] == 400
    assert pipe.model.config.image_token_id not in answer


# ------------------------------------------------------------------------------- backbones without a free row


PADS = ("<|box_start|>", "<|image_pad|>")


@pytest.mark.parametrize("frozen", ["include", "reference"])
def test_a_reserved_token_stands_for_images_where_no_row_is_free(folders, tmp_path, frozen):
    qwen2 = make_qwen2(tmp_path / "qwen2", reserved=PADS, vocab_size=None)
    options = {"backbone": str(tmp_path / "qwen2"), "frozen": frozen}
    with pytest.raises(ValueError, match="`image_token`"):
        init(folders, tmp_path / "out", **options)
    report = init(folders, tmp_path / "out", image_token="<|image_pad|>", **options)
    before = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert report["image_token_id"] == before.convert_tokens_to_ids("<|image_pad|>") and report["added_rows"] == 0
    image, answer, pipe = draw_and_describe(tmp_path / "out")
    assert pipe.model.config.image_token_id == report["image_token_id"] not in answer
    ids = torch.arange(len(before))[None]
    ids = ids[ids != report["image_token_id"]][None]
    with torch.no_grad():
        assert torch.equal(pipe.model.to(qwen2.dtype)(ids).logits, qwen2(ids).logits)
    assert len(pipe.processor.tokenizer) == len(before)
    text = "a red square <|box_start|> <|im_end|>"
    assert pipe.processor.tokenizer(text)["input_ids"] == before(text)["input_ids"]
    pipe = MMARPipeline.from_pretrained(tmp_path / "out")  # as saved, uncast
    pipe.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


@pytest.mark.parametrize(("tied", "shards"), [(True, "5GB"), (False, "60KB")])
def test_a_row_is_added_where_none_is_free(folders, tmp_path, tied, shards):
    qwen2 = make_qwen2(tmp_path / "qwen2", torch.float32, vocab_size=None, tie_word_embeddings=tied)
    options = {"backbone": str(tmp_path / "qwen2"), "max_shard_size": shards, "add_rows": True}
    report = init(folders, tmp_path / "out", **options)
    num_tokens = qwen2.config.vocab_size
    assert report["image_token_id"] == num_tokens and report["added_rows"] == 1
    image, answer, pipe = draw_and_describe(tmp_path / "out")
    assert image.size == (8, 8) and num_tokens not in answer
    model = pipe.model
    assert model.config.text_config.vocab_size == num_tokens + 1
    assert not model.lm_head.weight.requires_grad and not model.get_input_embeddings().weight.requires_grad
    for own, theirs in ((model.get_input_embeddings(), qwen2.model.embed_tokens), (model.lm_head, qwen2.lm_head)):
        assert torch.equal(own.weight[:-1], theirs.weight)
    ids = torch.arange(num_tokens)[None]
    with torch.no_grad():
        logits, expected = model(ids).logits, qwen2(ids).logits
    # A matrix product of another width adds up in another order.
    torch.testing.assert_close(logits[..., :-1], expected, rtol=1e-5, atol=1e-5)
    # So little is taken from the probabilities of the backbone's own tokens.
    assert float(logits.softmax(-1)[..., -1].max()) <= 1 / num_tokens
    pipe.save_pretrained(tmp_path / "again", max_shard_size=shards)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="`frozen='reference'`"):
        pipe.save_pretrained(tmp_path / "referenced", frozen="reference")
    with pytest.raises(ValueError, match="`add_rows`"):
        init(folders, tmp_path / "referenced", **options, frozen="reference")


def test_added_rows_are_not_taken_where_a_row_is_free(folders, tmp_path):
    report = init(folders, tmp_path / "out", add_rows=True)
    init(folders, tmp_path / "expected")
    assert report["added_rows"] == 0 and files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "red", "<|unknown|>"])
def test_a_token_that_the_tokenizer_uses_does_not_stand_for_images(folders, tmp_path, token):
    make_qwen2(tmp_path / "qwen2", reserved=PADS, eos_token_id=[2, 0])
    with pytest.raises(ValueError, match=r"`image_token` must be .*<\|image_pad\|>.*; got '" + re.escape(token)):
        init(folders, tmp_path / "out", backbone=str(tmp_path / "qwen2"), image_token=token)


# ----------------------------------------------------------------------------------------- the scale of the latents


@pytest.mark.parametrize(
    "scale", [{"scaling_factor": 1.0, "shift_factor": None}, {"scaling_factor": 0.18215, "shift_factor": None}, None]
)
def test_an_autoencoder_whose_scale_was_never_measured_is_taken_only_when_allowed(folders, tmp_path, scale):
    own = {name: value for name, value in VAE_CONFIG.items() if scale is not None or "factor" not in name}
    AutoencoderKL(**(own | (scale or {}))).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="`vae`"):
        init(folders, tmp_path / "out", vae=tmp_path / "vae")
    assert not (tmp_path / "out").exists()
    init(folders, tmp_path / "out", vae=tmp_path / "vae", allow_unmeasured_scale=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vae_config"]["scaling_factor"] == (0.18215 if scale is None else scale["scaling_factor"])


@pytest.mark.parametrize(
    "scale",
    [
        {"scaling_factor": 0.2325, "shift_factor": None},
        {"scaling_factor": 1.0, "shift_factor": 0.25},
        {"scaling_factor": 1.0, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4},
    ],
)
def test_each_form_of_a_measured_scale_is_taken(folders, tmp_path, scale):
    AutoencoderKL(**(VAE_CONFIG | {"shift_factor": None} | scale)).save_pretrained(tmp_path / "vae")
    init(folders, tmp_path / "out", vae=tmp_path / "vae")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["vae_config"]
    assert {name: config[name] for name in scale} == scale


@pytest.mark.parametrize("system", ["mmar", "vq"])
def test_a_model_begins_with_the_autoencoder_that_another_saved(folders, tmp_path, system):
    vq = make_system(tmp_path, system)
    tokenizer = tmp_path / "vqmodel" if system == "vq" else folders / "vae"
    init(folders, tmp_path / "first", preset=str(tmp_path / "preset"), vae=tokenizer)
    model = AutoModel.from_pretrained(tmp_path / "first")
    model.vae.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["_class_name"] == (type(vq).__name__ if system == "vq" else "AutoencoderKL")
    init(folders, tmp_path / "second", preset=str(tmp_path / "preset"), vae=tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


# ------------------------------------------------------------------------------------------------- by reference


@pytest.fixture(scope="module")
def referenced(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("referenced") / "mmar"
    init(folders, out, frozen="reference")
    return out


def test_reference_holds_only_what_is_trained(referenced, folders, tmp_path):
    names = set(load_file(referenced / "model.safetensors"))
    assert names and not any(
        name.startswith(("vae.", "lm_head.", "model.language_model."))
        for name in names
        if not name.endswith(("image_A", "image_B"))
    )
    parts = json.loads((referenced / "config.json").read_text())["frozen_parts"]
    assert parts["backbone"]["repo_id"] == str(folders / "qwen2")
    assert list(parts["backbone"]["sha256"]) == ["model.safetensors"]
    init(folders, tmp_path / "whole")
    joined = MMARForConditionalGeneration.from_pretrained(referenced)
    whole = MMARForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert joined.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in joined.state_dict().items())
    assert joined.name_or_path == str(referenced)
    assert not joined.lm_head.weight.requires_grad
    assert joined.get_parameter("model.latent_encoder.mask_token").requires_grad


@pytest.mark.parametrize("system", ["vq", "transfusion"])
def test_the_systems_of_table_3_by_reference(folders, tmp_path, system):
    """The codebook is the tokenizer's, and not written either."""
    make_system(tmp_path, system)
    tokenizer = tmp_path / "vqmodel" if system == "vq" else folders / "vae"
    for frozen in ("include", "reference"):
        init(folders, tmp_path / frozen, preset=str(tmp_path / "preset"), vae=tokenizer, frozen=frozen)
    assert not any(name.startswith("vae.") for name in load_file(tmp_path / "reference" / "model.safetensors"))
    whole, joined = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("include", "reference"))
    assert joined.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in joined.items())


def test_reference_saves_again_as_it_was_and_whole_when_asked(referenced, folders, tmp_path):
    pipe = MMARPipeline.from_pretrained(referenced)
    pipe.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(referenced)
    pipe.save_pretrained(tmp_path / "whole", frozen="include")
    init(folders, tmp_path / "expected")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "expected")
    # And back, from a model that holds all.
    whole = MMARPipeline.from_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "back", frozen="reference")
    assert files_of(tmp_path / "back") == files_of(referenced)


@pytest.mark.parametrize(("old", "new"), [("included", "include"), ("referenced", "reference")])
def test_a_folder_with_the_earlier_spelling_opens(referenced, tmp_path, recwarn, old, new):
    model = MMARForConditionalGeneration.from_pretrained(referenced)
    model.save_pretrained(tmp_path / "old", frozen=new)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"frozen_weights": old}))
    opened = MMARForConditionalGeneration.from_pretrained(tmp_path / "old")
    assert opened.config.frozen_weights == new
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in opened.state_dict().items())
    opened.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


def test_the_earlier_spelling_warns_where_it_is_typed(referenced, tmp_path):
    model = MMARForConditionalGeneration.from_pretrained(referenced)
    with pytest.warns(FutureWarning, match="`frozen`"):
        model.save_pretrained(tmp_path, frozen="referenced")
    with pytest.warns(FutureWarning, match="`frozen_weights`"):
        assert MMARConfig(frozen_weights="included").frozen_weights == "include"


def test_nothing_trained_is_left_out(referenced, tmp_path):
    model = MMARForConditionalGeneration.from_pretrained(referenced)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="`frozen='reference'`.*layers.1.mlp.up_proj.weight"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "out", frozen="include")
    again = MMARForConditionalGeneration.from_pretrained(tmp_path / "out")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def test_a_part_is_not_overwritten(folders, tmp_path):
    shutil.copytree(folders / "qwen2", tmp_path / "qwen2")
    init(folders, tmp_path / "mmar", backbone=str(tmp_path / "qwen2"))
    before = files_of(tmp_path / "qwen2")
    model = MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")
    for frozen in ("reference", "include"):
        with pytest.raises(ValueError, match="`save_directory`.*backbone"):
            model.save_pretrained(tmp_path / "qwen2", frozen=frozen)
    assert files_of(tmp_path / "qwen2") == before


def test_weights_that_no_reference_gives_are_not_left_out(folders, tmp_path):
    """An untied head over a reference whose head is tied."""
    make_qwen2(tmp_path / "untied", tie_word_embeddings=False)
    init(folders, tmp_path / "mmar", backbone=str(tmp_path / "untied"))
    model = MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")
    with safe_open(tmp_path / "untied" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "untied" / "model.safetensors", metadata={"format": "pt"})
    del model.config.frozen_parts["backbone"]["sha256"]
    with pytest.raises(ValueError, match="`frozen='reference'`.*lm_head.weight"):
        model.save_pretrained(tmp_path / "out", frozen="reference")


def test_broken_references(referenced, folders, tmp_path):
    def folder_with(part, reference):
        folder = tmp_path / f"{part}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(referenced, folder)
        config = json.loads((folder / "config.json").read_text())
        config["frozen_parts"][part] = reference
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    gone = folder_with("backbone", {"repo_id": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"`config.frozen_parts\['backbone'\]`.*nowhere"):
        MMARForConditionalGeneration.from_pretrained(gone)
    shutil.copytree(folders / "vae", tmp_path / "vae")
    reference = json.loads((referenced / "config.json").read_text())["frozen_parts"]["vae"]
    moved = folder_with("vae", reference | {"repo_id": str(tmp_path / "vae")})
    assert MMARForConditionalGeneration.from_pretrained(moved) is not None
    make_vae(tmp_path / "vae", seed=5)
    with pytest.raises(ValueError, match=r"`config.frozen_parts\['vae'\]`.*diffusion_pytorch_model.* has changed"):
        MMARForConditionalGeneration.from_pretrained(moved)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors"):
        MMARForConditionalGeneration.from_pretrained(moved)
    with pytest.raises(ValueError, match="`frozen`"):
        MMARForConditionalGeneration.from_pretrained(referenced).save_pretrained(tmp_path / "out", frozen="both")


@pytest.mark.parametrize("repo_id", ["no/where", "no name", "a/b/c"])
def test_a_repository_that_cannot_be_had_is_named(referenced, tmp_path, monkeypatch, repo_id):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(referenced, tmp_path / "mmar")
    config = json.loads((referenced / "config.json").read_text())
    config["frozen_parts"]["vae"] = {"repo_id": repo_id, "revision": "main"}
    (tmp_path / "mmar" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"`config.frozen_parts\['vae'\]`.*{repo_id}"):
        MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")


def test_references_written_by_hand_are_checked_and_completed(folders, tmp_path, monkeypatch):
    init(folders, tmp_path / "mmar")
    model = MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")
    bad = [
        ({"vae": "runs/kl16"}, r"`frozen_parts\['vae'\]` must be a dict with `repo_id`"),
        ({"vae": {"revision": "main"}}, r"`frozen_parts\['vae'\]` must be a dict with `repo_id`"),
        ({"vae": {"repo_id": "a/b", "revision": 3}}, r"`frozen_parts\['vae'\]` must be a dict with `repo_id`"),
        ({"vae": {"repo_id": "a/b", "sha256": {"model.safetensors": None}}}, "must be hashes by file name"),
        ({"head": {"repo_id": "a/b"}}, "`frozen_parts` may hold backbone, vae; got 'head'"),
    ]
    known = model.config.frozen_parts
    for parts, message in bad:
        model.config.frozen_parts = parts
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "bad", frozen="reference")
    assert not (tmp_path / "bad").exists()
    model.config.frozen_parts = {"vae": {"repo_id": str(folders / "vae"), "sha256": {"typo.safetensors": "00"}}}
    with pytest.raises(ValueError, match=r"`config.frozen_parts\['vae'\]`.*`sha256`"):
        model.save_pretrained(tmp_path / "bad", frozen="reference")
    # A relative folder becomes an absolute one with hashes: it holds wherever the model is opened from.
    monkeypatch.chdir(folders)
    model.config.frozen_parts = {"backbone": known["backbone"], "vae": {"repo_id": "vae"}}
    model.save_pretrained(tmp_path / "out", frozen="reference")
    assert model.config.frozen_parts["vae"] == {"repo_id": "vae"}  # as it was
    with pytest.raises(ValueError, match="`state_dict`"):
        model.save_pretrained(tmp_path / "empty", frozen="reference", state_dict={})
    written = json.loads((tmp_path / "out" / "config.json").read_text())["frozen_parts"]["vae"]
    assert written == known["vae"]


def test_local_references_are_not_pushed(referenced):
    pipe = MMARPipeline.from_pretrained(referenced)
    for pushed in (pipe, pipe.model):
        with pytest.raises(ValueError, match=r"`config.frozen_parts\['backbone'\]`"):
            pushed.push_to_hub("me/mmar")


# --------------------------------------------------------------------------------------------------- bad input


def _bad_parts(case, folders, tmp_path):
    backbone, vae = tmp_path / "qwen2", tmp_path / "vae"
    shutil.copytree(folders / "qwen2", backbone)
    shutil.copytree(folders / "vae", vae)
    options = {"backbone": str(backbone), "vae": vae}
    config = json.loads((backbone / "config.json").read_text())
    if case == "llama":
        (backbone / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    elif case == "no config":
        (backbone / "config.json").unlink()
    elif case == "no weights":
        (backbone / "model.safetensors").unlink()
    elif case == "missing shard":
        make_qwen2(backbone, max_shard_size="40KB")
        (backbone / "model.safetensors").unlink(missing_ok=True)
        sorted(backbone.glob("model-*.safetensors"))[1].unlink()
    elif case == "other size":
        (backbone / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    elif case == "fewer layers":
        layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        (backbone / "config.json").write_text(json.dumps(config | layers))
    elif case == "more layers":
        layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        (backbone / "config.json").write_text(json.dumps(config | layers))
    elif case == "no room":
        make_qwen2(backbone, vocab_size=None)
    elif case == "fewer rows":
        make_qwen2(backbone, vocab_size=len(AutoTokenizer.from_pretrained(folders / "qwen2")) - 1)
        options["add_rows"] = True
    elif case == "other vae":
        (vae / "config.json").write_text('{"model_type": "llama"}')
    elif case == "no tokenizer":
        for file in backbone.glob("tokenizer*"):
            file.unlink()
    elif case == "no vae":
        shutil.rmtree(vae)
    elif case == "preset":
        options["preset"] = "mmar-9b"
    elif case == "repository":
        options["backbone"] = "Qwen/Qwen2-7B-Instruct"
    elif case == "cut backbone":
        file = backbone / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "cut vae":
        file = vae / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif case == "shards":
        options["max_shard_size"] = "0GB"
    elif case == "shard size":
        options["max_shard_size"] = "abc"
    elif case == "dtype":
        options["dtype"] = "int8"
    return options


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("llama", "expected a Qwen2 or Qwen2.5.*got the model type 'llama'"),
        ("no config", "config.json cannot be read"),
        ("no weights", "model.safetensors missing"),
        ("missing shard", "model-00002-of-.*missing"),
        ("other size", r"gate_proj.weight of shape \(128, 64\).*the backbone has \(96, 64\)"),
        ("fewer layers", "weights are left over, among them model.layers.1"),
        ("more layers", "are missing, among them model.layers.2"),
        ("no room", "free row for the image token.*`add_rows`"),
        ("fewer rows", "must have a row for each of the"),
        ("other vae", "expected an AutoencoderKL.*'llama'"),
        ("no tokenizer", "expected Qwen2's tokenizer files"),
        ("no vae", "expected the folder of a diffusers AutoencoderKL"),
        ("preset", "`preset` must be one of mmar-0.5b, mmar-7b, mmar-tiny"),
        ("repository", "'Qwen/Qwen2-7B-Instruct' cannot be had.*the network"),
        ("cut backbone", "qwen2/model.safetensors'; got a missing, broken or truncated file"),
        ("cut vae", "diffusion_pytorch_model.safetensors'; got a missing, broken or truncated file"),
        ("shards", "`max_shard_size` must be above 0 bytes.*got '0GB'"),
        ("shard size", "`max_shard_size` must be above 0 bytes.*got 'abc'"),
        ("dtype", "`dtype` one of auto, float32"),
    ],
)
def test_bad_parts_leave_nothing(folders, tmp_path, monkeypatch, case, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = _bad_parts(case, folders, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        init(folders, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_presets_are_found():
    assert load_preset("mmar-7b").plora_rank == 1280
    assert load_preset("mmar-0.5b").text_config.hidden_size == 896


def test_preset_must_be_an_mmar(folders):
    with pytest.raises(ValueError, match="'qwen2'"):
        load_preset(str(folders / "qwen2"))


@pytest.mark.skipif(not QWEN2_FILES.is_dir(), reason="needs the real tokenizer files of shared/")
def test_real_tokenizer(folders, tmp_path):
    """Qwen2's own vocabulary at its own ids; a narrow model, since the weights do not matter here."""
    make_qwen2(tmp_path / "qwen2", vocab_size=151936, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    for file in (tmp_path / "qwen2").glob("tokenizer*"):
        file.unlink()
    for file in (QWEN2_FILES / "qwen2-tokenizer").iterdir():
        shutil.copy(file, tmp_path / "qwen2" / file.name)
    report = init(folders, tmp_path / "out", backbone=str(tmp_path / "qwen2"))
    assert report["image_token_id"] == 151646
    processor = MMARProcessor.from_pretrained(tmp_path / "out")
    source = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    text = "Draw 3 cats, 猫 и кошка: <|im_start|>user\nhello<|im_end|>"
    assert processor.tokenizer(text)["input_ids"] == source(text)["input_ids"]
    assert processor.tokenizer.decode(source(text)["input_ids"]) == text
    ids = torch.tensor([source(text)["input_ids"]])
    model, qwen2 = (
        cls.from_pretrained(tmp_path / name)
        for cls, name in ((MMARForConditionalGeneration, "out"), (Qwen2ForCausalLM, "qwen2"))
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, qwen2(ids).logits)


def test_command(folders, tmp_path):
    command = [sys.executable, "-m", "mmar", "convert", "qwen2", "--backbone", str(folders / "qwen2")]
    command += ["--vae", str(folders / "vae"), "--preset", str(folders / "preset"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dtype"] == "bfloat16"
    assert MMARPipeline.from_pretrained(tmp_path / "out") is not None

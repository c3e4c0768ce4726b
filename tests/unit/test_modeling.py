"""Initialization, freezing, dtypes, the latent scale, losses and their gradients, and what wrong input gets."""

import json

import pytest
import torch
from helpers import (
    IMAGE,
    image_marks,
    qwen2_of,
    random_latents,
    random_mask,
    random_text,
    seeded,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.executorch import register_dynamic_cache_export_support

from mmar.modeling_mmar.diffusion_mmar import cosine_alphas_cumprod
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration, MMARModel
from mmar.modeling_mmar.saving_mmar import MMARSavingMixin


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def batch(model):
    """Row 0: one picture; row 1: none; row 2: two. Labels on the last four tokens of each row."""
    text, marks = random_text(3, 44), image_marks(model, 1)[0]
    rows = [
        torch.cat([text[0, :20], marks, text[0, 20:28]]),
        text[1],
        torch.cat([text[2, :3], marks, text[2, 3:5], marks, text[2, 5:12]]),
    ]
    input_ids = torch.stack(rows)
    labels = torch.full_like(input_ids, -100)
    labels[:, -4:] = input_ids[:, -4:]
    return {"input_ids": input_ids, "labels": labels, "latents": random_latents(model, 3)}


# ------------------------------------------------------------------------------------------------- initialization


def check_initialization(model, names=None):
    """MAR's initialization of the head and the ViT, zeros of PLoRA and AdaLN, 0.02 of what is learned from nothing."""
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        matrix = parameter.ndim == 2
        if name.endswith("image_B"):
            assert not parameter.any(), name
        elif name.endswith("image_A"):
            # Kaiming uniform with a = sqrt(5): within 1 / sqrt(fan in).
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "modulation" in name or name.startswith("diffusion_mlp.output_projection"):
            assert not parameter.any(), name
        elif name.endswith(("mask_token", "position_embedding")):
            # 48 values and more: the std of so few is known to 10 percent, four times this is allowed.
            assert 0.012 < parameter.std() < 0.028 and abs(parameter.mean()) < 0.012, name
        elif name.startswith("diffusion_mlp.timestep_embedding") and name.endswith("weight"):
            assert 0.018 < parameter.std() < 0.022, name
        elif name.startswith(("diffusion_mlp.", "model.latent_encoder.")) and name.endswith("weight") and matrix:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif name.startswith(("diffusion_mlp.", "model.latent_encoder.")) and "norm" not in name:
            assert name.endswith("bias") and not parameter.any(), name


def test_initialization():
    torch.manual_seed(0)
    check_initialization(MMARForConditionalGeneration(tiny_config()))


@pytest.mark.parametrize(
    "missing", ["image_", "modulation", "mask_token", "position_embedding", "diffusion_mlp", "output_"]
)
def test_initialization_of_missing_keys(model, tmp_path, missing):
    """A checkpoint without some weights, such as a bare Qwen2: what is missing is initialized, the rest kept."""
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = {name for name in state if missing in name}
    assert names
    save_file({k: v for k, v in state.items() if k not in names}, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"{len(names)}"):
        MMARForConditionalGeneration.from_pretrained(tmp_path)
    # MMAR's own door is closed to such a folder; a subclass, or a conversion, may still go through transformers'.
    load = super(MMARSavingMixin, MMARForConditionalGeneration).from_pretrained
    loaded, info = load(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == names and not info["unexpected_keys"]
    check_initialization(loaded, names)
    for name, value in loaded.state_dict().items():
        if name in state and name not in names:
            assert torch.equal(value, state[name]), name


class ScoredModel(MMARForConditionalGeneration):
    """With a layer that no checkpoint of MMAR holds."""

    def __init__(self, config):
        super().__init__(config)
        self.score_head = nn.Linear(config.text_config.hidden_size, 2)
        self.post_init()


def test_a_subclass_with_a_new_layer_starts_from_a_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    scored, info = ScoredModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score_head.weight", "score_head.bias"}
    assert 0.01 < scored.score_head.weight.std() < 0.03 and not scored.score_head.bias.any()
    assert scored.score_head.weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(scored.state_dict()[name], value), name
    # Its own checkpoint must hold the layer, and MMAR's must hold all of MMAR.
    for folder, saved, hole in (
        ("own", scored, "score_head.weight"),
        ("base", model, "model.latent_encoder.mask_token"),
    ):
        saved.save_pretrained(tmp_path / folder)
        state = load_file(tmp_path / folder / "model.safetensors")
        del state[hole]
        save_file(state, tmp_path / folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"{hole}"):
            ScoredModel.from_pretrained(tmp_path / folder)


@pytest.mark.parametrize("given", [{"tp_plan": "auto"}, {"tp_size": 2}])
@pytest.mark.parametrize("model_class", [MMARForConditionalGeneration, MMARModel])
@pytest.mark.filterwarnings("ignore:Passing `tp_plan`:FutureWarning")
def test_tensor_parallelism_is_refused(model, tmp_path, model_class, given):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{next(iter(given))}`"):
        model_class.from_pretrained(tmp_path, **given)
    assert not model.supports_tp_plan and not model.tp_plan and not model.pp_plan


def test_manual_seed_decides_the_weights():
    first, second, other = (tiny_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.latent_encoder.mask_token"], other["model.latent_encoder.mask_token"])


# ------------------------------------------------------------------------------------------------------- freezing


def is_backbone(name):
    return name.startswith(("model.language_model.", "lm_head.")) and not name.endswith(("image_A", "image_B"))


def test_freeze(model):
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("vae.") and not is_backbone(name)), name
    model.freeze(train_backbone=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("vae.")), name
    model.freeze()
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("with_info", [False, True])
def test_freeze_survives_from_pretrained(model, tmp_path, with_info):
    model.save_pretrained(tmp_path)
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=with_info)
    loaded = loaded[0] if with_info else loaded
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == expected
    assert not loaded.training


# --------------------------------------------------------------------------------------------------------- dtypes


def test_vae_stays_float32_and_in_eval(model):
    assert model.dtype == torch.float32
    for cast, dtype in ((lambda: model.to(torch.bfloat16), torch.bfloat16), (lambda: model.half(), torch.float16)):
        cast()
        assert model.dtype == dtype and model.model.language_model.layers[0].mlp.up_proj.image_A.dtype == dtype
        assert model.vae.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.vae.parameters())
    model.train()
    assert model.training and model.model.training and not model.vae.training
    assert not any(module.training for module in model.vae.modules())


def test_casting_does_not_change_the_vae(model):
    before = {name: value.clone() for name, value in model.vae.state_dict().items()}
    model.to(torch.bfloat16).float()
    assert all(torch.equal(before[name], value) for name, value in model.vae.state_dict().items())


def test_bfloat16_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(value, expected if name.startswith("vae.") else expected.to(torch.bfloat16)), name
    pixel_values = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = loaded.encode_images(pixel_values)
    assert latents.dtype == torch.float32 and torch.equal(latents, model.encode_images(pixel_values))
    ids = torch.cat([random_text(2, 5), image_marks(model, 2), random_text(2, 5)], 1)
    logits = loaded(ids, pixel_values=pixel_values).logits
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 0.4 percent per rounding, some tens of roundings on logits near 1 to 5.
    torch.testing.assert_close(logits.float(), model(ids, pixel_values=pixel_values).logits, atol=0.25, rtol=0)


def test_bfloat16_trains(model, batch):
    model.to(torch.bfloat16).train()
    output = model(**batch, latent_mask=random_mask(model, 3), generator=seeded(0))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    output.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------ the scale


def test_latent_scale(model):
    pixel_values = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = model.vae.encode(pixel_values).latent_dist
    expected = (posterior.mean - 0.25) * 1.5
    latents = model.encode_images(pixel_values)
    assert torch.equal(latents, expected)
    decoded = model.decode_latents(latents)
    # The scale goes and comes back with a rounding each way.
    torch.testing.assert_close(decoded, model.vae.decode(posterior.mean).sample, atol=1e-5, rtol=0)


def test_latent_scale_per_channel():
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    model = tiny_model(vae_config={"latents_mean": mean, "latents_std": std})
    pixel_values = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = model.vae.encode(pixel_values).latent_dist.mean
    latents = model.encode_images(pixel_values)
    for channel in range(4):
        expected = (posterior[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(latents[:, channel], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.decode_latents(latents), model.vae.decode(posterior).sample, atol=1e-5, rtol=0)


def test_posterior_is_sampled_in_training_and_its_mode_read_at_inference(model):
    pixel_values = torch.rand(1, 3, 8, 8) * 2 - 1
    mode = model.encode_images(pixel_values)
    assert torch.equal(mode, model.encode_images(pixel_values))
    sample = model.encode_images(pixel_values, sample_posterior=True, generator=seeded(1))
    with torch.no_grad():
        posterior = model.vae.encode(pixel_values).latent_dist
    expected = (posterior.mean + posterior.std * torch.randn(mode.shape, generator=seeded(1)) - 0.25) * 1.5
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)
    ids = torch.cat([random_text(1, 4), image_marks(model, 1)], 1)
    with torch.no_grad():
        assert torch.equal(
            model(ids, pixel_values=pixel_values).image_hidden_states,
            model(ids, latents=mode).image_hidden_states,
        )
        model.train()
        trained = model(ids, pixel_values=pixel_values, generator=seeded(1)).image_hidden_states
        torch.testing.assert_close(trained, model(ids, latents=sample).image_hidden_states, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- losses


def test_text_loss_is_cross_entropy_of_shifted_labels(model, batch):
    output = model(**batch)
    shifted = F.cross_entropy(output.logits[:, :-1].reshape(-1, 128), batch["labels"][:, 1:].reshape(-1))
    # The same twelve terms, the logits from another matrix product.
    torch.testing.assert_close(output.text_loss, shifted, rtol=1e-5, atol=0)
    assert torch.equal(output.loss, output.text_loss) and output.image_loss is None
    model.train()
    trained = model(**batch)
    assert trained.logits is None
    torch.testing.assert_close(trained.text_loss, shifted, rtol=1e-5, atol=0)


def test_image_loss_by_hand(model, batch):
    mask = random_mask(model, 3)
    mask[1] = False
    del batch["labels"]
    output = model(**batch, latent_mask=mask, generator=seeded(4))
    z = output.image_hidden_states
    generator, alphas = seeded(4), cosine_alphas_cumprod(1000)
    tokens = batch["latents"].flatten(2).transpose(1, 2)
    hidden = mask.nonzero().tolist() * 2
    timesteps = torch.randint(0, 1000, (len(hidden),), generator=generator)
    noise = torch.randn(len(hidden), 4, generator=generator)
    total = 0.0
    for row, (picture, place) in enumerate(hidden):
        cos, sin = alphas[timesteps[row]].sqrt(), (1 - alphas[timesteps[row]]).sqrt()
        x = tokens[picture, place]
        v = model.diffusion_mlp((cos * x + sin * noise[row])[None], timesteps[row][None], z[picture, place][None])
        total += (v[0] - (cos * noise[row] - sin * x)).square().mean()
    # A mean of some hundred squares near 1 in another order.
    torch.testing.assert_close(output.image_loss, total / len(hidden), rtol=1e-5, atol=0)
    assert torch.equal(output.loss, output.image_loss) and output.text_loss is None
    assert torch.equal(model(**batch, latent_mask=mask, generator=seeded(4)).loss, output.loss)


def test_epsilon_model_has_another_loss_of_the_same_draw(batch):
    mask = random_mask(tiny_model(), 3)
    losses = [
        tiny_model(diffusion_config={"prediction_type": kind})(
            **batch, latent_mask=mask, generator=seeded(4)
        ).image_loss.item()
        for kind in ("v_prediction", "epsilon")
    ]
    assert losses[0] != losses[1]


def test_total_loss_is_the_sum(model, batch):
    output = model(**batch, latent_mask=random_mask(model, 3), generator=seeded(4))
    assert torch.equal(output.loss, output.text_loss + output.image_loss)
    text_only = model(**batch)
    known = model(**batch, latent_mask=torch.zeros(3, 16, dtype=torch.bool))
    # Nothing hidden: no image loss, and the text's is that of understanding.
    assert known.image_loss is None
    torch.testing.assert_close(known.loss, text_only.loss, rtol=1e-5, atol=0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss is None


def embedded(model, latents, mask=None):
    """What the language model reads in the places of images."""
    return model.model.latent_encoder(latents.flatten(2).transpose(1, 2), mask)


def test_z_stands_at_its_pictures(model, batch):
    del batch["labels"]
    with torch.no_grad():
        z = model(**batch).image_hidden_states
        hidden = model.model(batch["input_ids"], image_embeds=embedded(model, batch["latents"])).last_hidden_state
    assert torch.equal(z, torch.stack([hidden[0, 20:36], hidden[2, 3:19], hidden[2, 21:37]]))


def test_loss_is_a_mean_over_rows_and_pictures(model, batch):
    """The batch of three rows against its rows one by one."""
    with torch.no_grad():
        together = model(**batch).text_loss
        pictures = [batch["latents"][:1], None, batch["latents"][1:]]
        alone = [
            model(batch["input_ids"][row : row + 1], labels=batch["labels"][row : row + 1], latents=pictures[row]).loss
            for row in range(3)
        ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def test_output_as_tuple(model, batch):
    output = model(**batch)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)


def test_logits_to_keep(model, batch):
    del batch["labels"]
    with torch.no_grad():
        full = model(**batch).logits
        for kept, expected in ((1, full[:, -1:]), (3, full[:, -3:]), (torch.tensor([0, 5]), full[:, [0, 5]])):
            # Another shape of the same matrix product.
            torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("train_backbone", [False, True])
def test_gradients_reach_exactly_the_trainable_parameters(model, batch, train_backbone):
    model.freeze(train_backbone=train_backbone)
    model.train()
    model(**batch, latent_mask=random_mask(model, 3), generator=seeded(0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and not name.endswith(("k_proj.bias", "qkv.bias")):
            # A key's bias adds the same to every score of a query; the softmax does not see it.
            assert parameter.grad.any(), name
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())


def test_no_gradient_for_a_text_prefix(model):
    """Text before a picture passes nothing that is trained: only its positions are labelled here."""
    ids = torch.cat([random_text(2, 6), image_marks(model, 2)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, :6] = ids[:, :6]
    model.train()
    model(ids, latents=random_latents(model, 2), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_every_trainable_parameter_gets_a_gradient_in_any_batch_with_pictures(model, batch):
    """Also with everything hidden, where EmbeddingViT has nothing to read: ranks must not diverge."""
    model.train()
    model(**batch, latent_mask=torch.ones(3, 16, dtype=torch.bool), generator=seeded(0)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("train_backbone", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, batch, train_backbone):
    model.freeze(train_backbone=train_backbone)
    model.train()
    arguments = {**batch, "latent_mask": random_mask(model, 3)}
    gradients = []
    calls = {"llm": 0, "vit": 0}
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.update(llm=calls["llm"] + 1))
    model.model.latent_encoder.embedding_vit.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.update(vit=calls["vit"] + 1)
    )
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**arguments, generator=seeded(0)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # Once without, and twice with: both stacks are computed again in the backward pass. With a frozen backbone the
    # text before the pictures is one more call of each forward pass, and none of the backward pass.
    assert calls == {"llm": 3 if train_backbone else 5, "vit": 3}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The same operations on the same values.
        assert torch.equal(gradient, gradients[1][name]), name


def test_training_step_is_deterministic(batch):
    losses = []
    for _ in range(2):
        model = tiny_model().train()
        torch.manual_seed(3)
        loss = model(**batch, latent_mask=random_mask(model, 3)).loss
        loss.backward()
        losses.append((loss.detach(), model.diffusion_mlp.output_projection.weight.grad))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


# ----------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("part", ["diffusion_mlp", "vae", "model.latent_encoder"])
def test_a_model_with_a_compiled_part_is_saved_and_loaded(tmp_path, part):
    model = tiny_model(seed=1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parent, _, name = part.rpartition(".")
    # Compiled at its first call; `module.compile()` would leave the names as they are.
    setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(part)))
    if part == "diffusion_mlp":
        model.diffusion_mlp.blocks[0] = torch.compile(model.diffusion_mlp.blocks[0])
    model.save_pretrained(tmp_path)
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = tiny_model(text_config={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in keys) == (not tied)
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == tied
    ids = torch.cat([random_text(2, 5), image_marks(model, 2), random_text(2, 5)], 1)
    pixel_values = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(ids, pixel_values=pixel_values).logits, model(ids, pixel_values=pixel_values).logits)
    assert json.loads((tmp_path / "config.json").read_text())["vae_config"]["scaling_factor"] == 1.5


def test_attention_implementations_agree(batch):
    with torch.no_grad():
        outputs = [
            tiny_model(attn_implementation=name)(
                **batch, latent_mask=random_mask(tiny_model(), 3), generator=seeded(0)
            )
            for name in ("sdpa", "eager")
        ]
    # Float32 in another order.
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=5e-5, rtol=0)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["flash_attn", "flex_attn"])
def test_attention_without_the_block_mask_is_refused(name):
    """By flag: whether the refusal comes before the look for an installed kernel is up to transformers."""
    for module in tiny_model().modules():
        if isinstance(module, PreTrainedModel):
            assert getattr(module, f"_supports_{name}") is False, type(module).__name__
    with pytest.raises((ValueError, ImportError)):
        tiny_model(attn_implementation="flash_attention_2" if name == "flash_attn" else "flex_attention")


def test_embeddings_in_place_of_ids(model, batch):
    labels = batch.pop("labels")
    ids, mask = batch["input_ids"], batch["input_ids"] == 127
    embeds = model.get_input_embeddings()(ids.masked_fill(mask, 5))
    with torch.no_grad():
        expected = model(**batch, labels=labels)
        output = model(inputs_embeds=embeds, image_token_mask=mask, latents=batch["latents"], labels=labels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize("train", [False, True])
def test_images_stand_where_the_placeholders_embedding_is(model, batch, train):
    """As prompt tuning gives them: embeddings with trained ones before, and images."""
    pixels = torch.rand(3, 3, 8, 8, generator=seeded(0)) * 2 - 1
    ids, labels = batch["input_ids"], batch["labels"]
    prefix = torch.randn(3, 4, 64, generator=seeded(1)).requires_grad_()
    embeds = torch.cat([prefix, model.get_input_embeddings()(ids)], 1)
    labels = F.pad(labels, (4, 0), value=-100)
    given = {
        "inputs_embeds": embeds,
        "pixel_values": pixels,
        "labels": labels,
        "attention_mask": torch.ones_like(labels),
    }
    model.train(train)
    output = model(**given, generator=seeded(2))
    expected = model(**given, generator=seeded(2), image_token_mask=F.pad(ids == IMAGE, (4, 0)))
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.image_hidden_states, expected.image_hidden_states)
    output.loss.backward()
    assert prefix.grad.abs().sum() > 0


def test_a_mask_of_image_tokens_wins_over_ids_and_embeddings(model):
    ids = torch.cat([image_marks(model, 1), random_text(1, 16)], 1)
    mask = torch.arange(32)[None] >= 16  # the images stand where text is
    latents = random_latents(model, 1)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        by_ids = model(ids, latents=latents, image_token_mask=mask).logits
        by_embeds = model(inputs_embeds=embeds, latents=latents, image_token_mask=mask).logits
        other = model(ids, latents=latents).logits
    assert torch.equal(by_ids, by_embeds)
    assert not torch.allclose(by_ids, other)


def test_the_image_tokens_own_embedding_is_never_read(model, batch):
    with torch.no_grad():
        expected = model.model(batch["input_ids"], image_embeds=embedded(model, batch["latents"])).last_hidden_state
        model.get_input_embeddings().weight[127] = float("nan")
        output = model.model(batch["input_ids"], image_embeds=embedded(model, batch["latents"])).last_hidden_state
    assert torch.equal(output, expected)


def test_text_in_a_batch_with_pictures_equals_qwen2(model, batch):
    with torch.no_grad():
        logits = model(batch["input_ids"], latents=batch["latents"]).logits
        expected = qwen2_of(model)(batch["input_ids"][1:2]).logits
    # The mask picks another attention kernel and the batch another matrix shape.
    torch.testing.assert_close(logits[1:2], expected, atol=5e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ export and compile


@pytest.fixture
def shallow_model():
    """Few layers: each is traced anew."""
    return tiny_model(text_config={"num_hidden_layers": 1}, vit_config={"num_hidden_layers": 1})


def inputs_of_rows(model, rows, seed=0, with_images=True):
    """Text, and an image in it, left padded in the first row."""
    text = random_text(rows, 6 + rows, seed=seed)
    if not with_images:
        return {"input_ids": text}
    ids = torch.cat([text[:, :4], image_marks(model, rows), text[:, 4:]], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    pixels = torch.rand(rows, 3, 8, 8, generator=seeded(seed)) * 2 - 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
@pytest.mark.parametrize("with_images", [False, True])
def test_export(shallow_model, with_images):
    """For any number of rows and tokens."""
    model = shallow_model
    inputs = inputs_of_rows(model, 2, with_images=with_images) | {"use_cache": False}
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    axes = {"input_ids": {0: rows, 1: length}, "attention_mask": {0: rows, 1: length}, "pixel_values": {0: rows}}
    axes = {name: axes.get(name) for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=axes).module()
    for other in (inputs, inputs_of_rows(model, 3, seed=1, with_images=with_images) | {"use_cache": False}):
        got, expected = exported(**other), model(**other)
        torch.testing.assert_close(got.logits, expected.logits, atol=5e-5, rtol=0)
        if with_images:
            torch.testing.assert_close(got.image_hidden_states, expected.image_hidden_states, atol=5e-5, rtol=0)


@torch.no_grad()
def test_export_with_a_cache_in_the_output(shallow_model):
    model = shallow_model
    register_dynamic_cache_export_support()
    inputs, rows = inputs_of_rows(model, 2), torch.export.Dim("rows")
    exported = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs}).module()
    other = inputs_of_rows(model, 2, seed=1)
    torch.testing.assert_close(exported(**other).logits, model(**other).logits, atol=5e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(shallow_model, dynamic):
    model = shallow_model
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    for rows in (2, 3):
        for with_images in (False, True):
            inputs = inputs_of_rows(model, rows, seed=rows, with_images=with_images)
            got, expected = compiled(**inputs), model(**inputs)
            torch.testing.assert_close(got.logits, expected.logits, atol=5e-5, rtol=0)
    # The cache that it leaves goes on as one that was made uncompiled.
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    next_ids = random_text(rows, 1, seed=9)
    expected = model(next_ids, attention_mask=mask, past_key_values=expected.past_key_values).logits
    got = model(next_ids, attention_mask=mask, past_key_values=got.past_key_values).logits
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- errors


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixel_values", "latents"])
@pytest.mark.parametrize("is_training", [False, True])
def test_no_pictures_as_an_empty_tensor(model, name, is_training):
    size = model.config.image_size if name == "pixel_values" else model.config.latent_size
    channels = 3 if name == "pixel_values" else model.config.latent_channels
    pictures = {name: torch.zeros(0, channels, size, size), "latent_mask": torch.zeros(0, 16, dtype=torch.bool)}
    ids = random_text(2, 5)
    model.train(is_training)
    try:
        got, expected = model(ids, labels=ids, **pictures), model(ids, labels=ids)
    finally:
        model.eval()
    assert torch.equal(got.loss, expected.loss) and got.image_hidden_states is None
    if is_training:
        return
    del pictures["latent_mask"]
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids, **pictures, **settings), model.generate(ids, **settings))
    # Marks without pictures are still told of.
    with pytest.raises(ValueError, match="0 .*32"):
        model(image_marks(model, 2), **pictures)


def test_an_empty_mask_beside_pictures_is_refused(model):
    with pytest.raises(ValueError, match="`latent_mask`"):
        model(
            image_marks(model, 2), latents=random_latents(model, 2), latent_mask=torch.zeros(0, 16, dtype=torch.bool)
        )


def test_wrong_number_of_pictures(model, batch):
    ids = batch["input_ids"]
    for latents, message in (
        (None, "0 .*48"),
        (random_latents(model, 2), "2 .*48"),
        (random_latents(model, 4), "4 .*48"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, latents=latents)
    with pytest.raises(ValueError, match="got 0"):
        model(random_text(1, 5), latents=random_latents(model, 1))
    with pytest.raises(ValueError, match="1 .*15"):
        model(ids[:1, :35], latents=random_latents(model, 1))


def test_pictures_that_do_not_fit_their_rows(model):
    """The total is right, but a row holds half a picture."""
    marks = image_marks(model, 1)
    ids = torch.stack([torch.cat([marks[0, :8], random_text(1, 16)[0]]), torch.cat([marks[0], marks[0, :8]])])
    with pytest.raises(ValueError, match="row"):
        model(ids, latents=random_latents(model, 2))


def test_both_pictures_and_latents(model, batch):
    with pytest.raises(ValueError, match="`pixel_values`"):
        model(batch["input_ids"], pixel_values=torch.zeros(3, 3, 8, 8), latents=batch["latents"])


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 1, 8, 8), (3, 8, 8)])
def test_wrong_picture_size(model, shape):
    ids = torch.cat([random_text(1, 4), image_marks(model, 1)], 1)
    with pytest.raises(ValueError, match="`pixel_values`"):
        model(ids, pixel_values=torch.zeros(shape))


def test_wrong_latents_and_masks(model):
    ids = torch.cat([random_text(1, 4), image_marks(model, 1)], 1)
    for shape in ((1, 4, 8, 8), (1, 3, 4, 4), (1, 16, 4)):
        with pytest.raises(ValueError, match="`latents`"):
            model(ids, latents=torch.zeros(shape))
    for mask in (torch.ones(2, 16, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 16)):
        with pytest.raises(ValueError, match="`latent_mask`"):
            model(ids, latents=torch.zeros(1, 4, 4, 4), latent_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, "`input_ids` must be a torch tensor; got list"),
        ({"input_ids": torch.ones(1, 2), "labels": None}, "`input_ids` must be integers; got torch.float32"),
        ({"input_ids": torch.ones(2, dtype=torch.long)}, r"`input_ids` must have the shape \(B, L\); got \(2,\)"),
        ({"input_ids": random_text(1, 4), "labels": random_text(1, 3)}, r"`labels` must have the shape \(1, 4\)"),
        ({"input_ids": random_text(1, 4), "pixel_values": [1.0]}, "`pixel_values` must be a torch tensor; got list"),
        (
            {"input_ids": torch.full((1, 3), 128)},
            r"`input_ids` must be in \[0, 128\), the model's vocabulary; got 128",
        ),
        (
            {"input_ids": random_text(1, 2), "labels": torch.full((1, 2), -1)},
            r"`labels` must be in .*, or -100; got -1",
        ),
        ({"input_ids": random_text(1, 2), "labels": torch.ones(1, 2)}, "`labels` must be integers; got torch.float32"),
        ({"input_ids": random_text(1, 4), "attention_mask": [1]}, "`attention_mask` must be a torch tensor; got list"),
        (
            {"input_ids": random_text(1, 4), "attention_mask": torch.ones(1, 3)},
            r"`attention_mask` must have a row and column per token.*at least \(1, 4\); got \(1, 3\)",
        ),
        ({"input_ids": random_text(1, 4), "latent_mask": True}, "`latent_mask` must be a torch tensor; got bool"),
    ],
)
def test_inputs_of_another_kind(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"`input_ids` must be a torch tensor; got list.*pass them as `\*\*inputs`"),
        ({"input_ids": random_text(1, 4)[0]}, r"`input_ids` must have the shape \(B, L\)"),
        ({"input_ids": torch.full((1, 3), 9999)}, "`input_ids` must be in .* got 9999"),
        ({"input_ids": random_text(1, 4), "attention_mask": torch.ones(1, 3)}, r"at least \(1, 4\); got \(1, 3\)"),
        ({"input_ids": random_text(1, 4), "attention_mask": torch.ones(1, 5)}, r"must have the shape \(1, 4\)"),
        ({"input_ids": random_text(1, 4), "attention_mask": [[1] * 4]}, "`attention_mask` must be a torch tensor"),
        ({"generation_mode": "image"}, "expected `input_ids`, the text before the picture; got none"),
        (
            {"generation_mode": "image", "input_ids": random_text(1, 4), "num_return_sequences": 2},
            "`num_return_sequences` must be 1 for pictures; got 2. Repeat the rows",
        ),
        (
            {"input_ids": torch.full((1, 16), IMAGE), "prefill_chunk_size": 4},
            "a prompt with pictures is read as a whole.*got `prefill_chunk_size` 4",
        ),
    ],
)
def test_generate_with_inputs_of_another_kind(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"max_new_tokens": 1, **arguments} if "generation_mode" not in arguments else arguments)
    if "generation_mode" not in arguments:
        with pytest.raises(ValueError, match="`input_ids`"):
            model.generate({"input_ids": random_text(1, 4)})


def test_pictures_and_latents_in_another_range(model):
    with pytest.raises(ValueError, match="255"):
        model.encode_images(torch.full((1, 3, 8, 8), 255.0))
    with pytest.raises(ValueError, match="finite"):
        model.encode_images(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="finite"):
        model.decode_latents(torch.full((1, 4, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="`latents`"):
        model.decode_latents(torch.zeros(1, 4, 3, 3))


def test_ids_or_embeddings(model):
    ids = random_text(1, 4)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 4, 64)}):
        with pytest.raises(ValueError, match="`input_ids`"):
            model(**arguments)


def test_a_text_longer_than_the_positions_is_refused():
    model = tiny_model(text_config={"max_position_embeddings": 20})
    with pytest.raises(ValueError, match="20 .*21"):
        model(random_text(1, 21))
    # A picture takes one position: 16 image tokens and 19 of text fit.
    ids = torch.cat([image_marks(model, 1), random_text(1, 19)], dim=1)
    assert model(ids, latents=random_latents(model, 1)).logits.shape[1] == 35
    with pytest.raises(ValueError, match="got 21"):
        model.generate(torch.cat([image_marks(model, 1), random_text(1, 20)], dim=1), latents=random_latents(model, 1))


def test_training_runs_every_part_whatever_the_batch():
    model = tiny_model().train()
    ids = random_text(1, 6)
    model(ids, labels=ids).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    gradients = {name: p.grad for name, p in model.diffusion_mlp.named_parameters()}
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_right_padding_in_a_cache_keeps_the_next_position():
    model = tiny_model()
    ids = random_text(1, 5)
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    cache = model(padded, attention_mask=mask, use_cache=True).past_key_values
    longer = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
    following = random_text(1, 1, seed=1)
    got = model(following, attention_mask=longer, past_key_values=cache).logits[:, -1]
    expected = model(torch.cat([ids, following], dim=1)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # other shapes round differently


def test_saving_sharded_over_unsharded_and_back_leaves_the_new_weights(tmp_path):
    for seed, options in ((0, {}), (1, {"max_shard_size": "100KB"}), (2, {})):
        model = tiny_model(seed)
        model.save_pretrained(tmp_path, **options)
        loaded = MMARForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert (tmp_path / "model.safetensors").is_file() == (not options)


def test_saving_to_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        tiny_model().save_pretrained(tmp_path / "file")


def test_pictures_and_latents_must_be_finite_and_scaled():
    model = tiny_model()
    ids = torch.cat([image_marks(model, 1), random_text(1, 3)], dim=1)
    with pytest.raises(ValueError, match="finite"):
        model(ids, latents=random_latents(model, 1) * torch.nan)
    with pytest.raises(ValueError, match="floating point"):
        model(ids, pixel_values=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("length", "options", "got"),
    [
        (15, {"max_length": 40}, "got 15 and up to 25 new tokens"),
        (19, {}, "got 19 and up to 20 new tokens"),
        (19, {"generation_config": GenerationConfig(max_new_tokens=2)}, "got 19 and up to 2 new tokens"),
    ],
)
def test_every_way_to_give_a_length_counts(length, options, got):
    model = tiny_model(text_config={"max_position_embeddings": 20})
    with pytest.raises(ValueError, match=f"20 .*{got}"):
        model.generate(random_text(1, length), **options)


def test_padding_takes_no_position_in_generation():
    model = tiny_model(text_config={"max_position_embeddings": 20})
    ids = torch.cat([random_text(2, 15), random_text(2, 4)], dim=1)
    mask = torch.cat([torch.zeros(2, 15), torch.ones(2, 4)], dim=1).long()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=16, eos_token_id=-1).shape == (2, 35)


def test_a_generation_config_of_ones_own_is_quiet(model, capfd):
    model.generate(random_text(1, 4), generation_config=GenerationConfig(max_new_tokens=2))
    assert "deprecated" not in capfd.readouterr().err


def test_generation_from_embeddings(model):
    ids = random_text(1, 6)
    expected = model.generate(ids, max_new_tokens=5)[:, 6:]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5), expected)


def test_generation_from_embeddings_with_a_picture(model):
    latents = random_latents(model, 1)
    ids = torch.cat([random_text(1, 3), image_marks(model, 1), random_text(1, 3, seed=1)], dim=1)
    expected = model.generate(ids, latents=latents, max_new_tokens=5)[:, ids.shape[1] :]
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(
        inputs_embeds=embeds, latents=latents, image_token_mask=ids == IMAGE, max_new_tokens=5, use_cache=True
    )
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_from_embeddings_finds_the_images(model, settings):
    pixels = torch.rand(3, 3, 8, 8, generator=seeded(0)) * 2 - 1
    marks, text = image_marks(model, 1)[0], random_text(2, 30)
    ids = torch.stack([torch.cat([text[0, :20], marks]), torch.cat([text[1, :2], marks, text[1, 2:4], marks])])
    ids = torch.cat([ids, random_text(2, 3, seed=1)], 1)
    settings |= {"max_new_tokens": 5, "do_sample": False, "pixel_values": pixels}
    expected = model.generate(ids, **settings)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings), expected)


def test_generation_does_not_run_past_the_positions():
    model = tiny_model(text_config={"max_position_embeddings": 20})
    with pytest.raises(ValueError, match="15 .*6"):
        model.generate(random_text(1, 15), max_new_tokens=6)
    assert model.generate(random_text(1, 15), max_new_tokens=5, min_new_tokens=5).shape == (1, 20)

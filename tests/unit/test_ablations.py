"""The systems that the paper compares MMAR with: losses, gradients, text, pictures, and a folder that opens again."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import IMAGE, image_marks, random_latents, random_text, seeded, tiny_arguments, tiny_config
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from mmar import MMARForConditionalGeneration
from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig, MMARTransfusionForConditionalGeneration
from mmar.ablations.modeling_vq_mmar import MMARVQConfig, MMARVQForConditionalGeneration


VQ = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 24,
    "norm_num_groups": 4,
    "sample_size": 8,
}
SYSTEMS = ["epsilon", "vq", "transfusion"]


def make(system, **changes):
    torch.manual_seed(0)
    if system == "epsilon":
        config = tiny_config(diffusion_config={"prediction_type": "epsilon"})
        model = MMARForConditionalGeneration._from_config(config)
    elif system == "vq":
        model = MMARVQForConditionalGeneration._from_config(
            MMARVQConfig(**tiny_arguments() | {"vae_config": VQ} | changes)
        )
        # diffusers begins with codes that are nearly one.
        torch.nn.init.normal_(model.vae.quantize.embedding.weight)
        torch.nn.init.normal_(model.vae.quant_conv.weight, std=2.0)
    else:
        epsilon = tiny_arguments(diffusion_config={"prediction_type": "epsilon"})
        model = MMARTransfusionForConditionalGeneration._from_config(MMARTransfusionConfig(**epsilon | changes))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("image_B", "modulation", "output_projection", "code_head", "noise_head")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    return request.param, make(request.param)


def batch_of(model, hides=True):
    """A caption before a picture to draw, and a picture before an answer."""
    text, marks = random_text(2, 9), image_marks(model, 1)[0]
    ids = torch.stack([torch.cat([text[0], marks]), torch.cat([text[1, :3], marks, text[1, 3:]])])
    labels = ids.clone()
    labels[0], labels[1, :19] = -100, -100
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0] = hides
    if model.config.model_type == "mmar_vq":
        codes = torch.randint(0, 24, (2, 16), generator=seeded(0))
        latents = model.codebook[codes].transpose(1, 2).reshape(2, 4, 4, 4)
    else:
        latents = random_latents(model, 2)
    return {"input_ids": ids, "labels": labels, "latents": latents, "latent_mask": mask}


def test_every_trained_weight_gets_a_gradient(system):
    name, model = system
    model.train()
    try:
        output = model(**batch_of(model), generator=[seeded(0), seeded(1)])
        output.loss.backward()
    finally:
        model.eval()
    assert output.text_loss > 0 and output.image_loss > 0
    torch.testing.assert_close(output.loss, output.text_loss + output.image_loss)
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The mask token and the last layer's own: all of them are reached; EmbeddingViT reads the known picture.
    assert without == []
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("lm_head"))
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("hides", [True, False], ids=["to draw", "to read"])
def test_ranks_run_the_same_modules(system, hides):
    """A batch without text loss, or without a picture to draw, still reaches every trained weight."""
    _, model = system
    model.train()
    try:
        batch = batch_of(model, hides)
        if hides:
            batch["labels"] = None
        model(**batch).loss.backward()
    finally:
        model.eval()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)


def draw(model, batch=2, **arguments):
    defaults = {
        "input_ids": random_text(batch, 6),
        "negative_input_ids": random_text(1, 3, seed=1).repeat(batch, 1),
        "guidance_scale": 2.0,
        "num_ar_steps": 3,
        "num_inference_steps": 4,
    }
    return model.generate_images(**defaults | arguments)


def test_pictures(system):
    name, model = system
    # Epsilon-prediction divides by the least sqrt(alpha_bar), 5e-5, so that roundings grow.
    tolerance = 2e-2 if name == "epsilon" else 1e-3
    latents = draw(model, generator=[seeded(0), seeded(1)], output_type="latent")
    pictures = draw(model, generator=[seeded(0), seeded(1)])
    assert pictures.shape == (2, 3, 8, 8) and torch.equal(model.decode_latents(latents), pictures)
    # A picture is that of its generator and its prompt, whatever else is drawn.
    alone = draw(model, 1, generator=[seeded(0)], output_type="latent")
    torch.testing.assert_close(alone[0], latents[0], atol=tolerance, rtol=tolerance)
    other = draw(model, generator=[seeded(2), seeded(1)], output_type="latent")
    assert not torch.allclose(other[0], latents[0], atol=1e-3)
    unguided = draw(model, generator=[seeded(0), seeded(1)], guidance_scale=1.0, output_type="latent")
    assert not torch.allclose(unguided, latents, atol=1e-3)
    merged = draw(model, generator=[seeded(0), seeded(1)], output_type="latent", fast=False)
    torch.testing.assert_close(merged, latents, atol=tolerance, rtol=tolerance)


def test_callback_and_interrupt(system):
    _, model = system
    seen = []

    def stop(step, num_steps, latents, hidden):
        seen.append((step, num_steps, latents.shape, int(hidden.sum())))
        return {"interrupt": step == 1}

    draw(model, generator=seeded(0), callback=stop, output_type="latent")
    assert [entry[0] for entry in seen] == [0, 1] and seen[0][2] == (2, 4, 4, 4)


def test_callback_turns_guidance_off(system):
    _, model = system

    def turn_off(step, num_steps, latents, hidden):
        return {"guidance_scale": 0.0} if step == 0 else None

    constant, unguided, changed = (
        draw(model, generator=seeded(0), output_type="latent", **arguments)
        # Strong, since of an untrained model both predictions are alike.
        for arguments in (
            {"guidance_scale": 100.0},
            {"guidance_scale": 1.0},
            {"guidance_scale": 100.0, "callback": turn_off},
        )
    )
    assert not torch.equal(changed, constant) and not torch.equal(changed, unguided)


def test_text_about_a_picture(system):
    _, model = system
    batch = batch_of(model)
    prompt = {"input_ids": batch["input_ids"][1:, :22], "latents": batch["latents"][1:]}
    text = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False, **cache), text)
    with torch.no_grad():
        logits = model(**prompt).logits
        other = model(prompt["input_ids"], latents=prompt["latents"].flip(-1)).logits
    assert not torch.allclose(logits, other, atol=1e-3)


def test_folder_opens_again(system, tmp_path):
    """Installed by the auto classes; and by the folder's own code, in a process that knows no MMAR."""
    name, model = system
    model.save_pretrained(tmp_path)
    expected = draw(model, generator=[seeded(0), seeded(1)], output_type="latent")
    opened = AutoModel.from_pretrained(tmp_path)
    assert type(opened) is type(model) and type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert torch.equal(draw(opened, generator=[seeded(0), seeded(1)], output_type="latent"), expected)
    script = f"""
import sys
sys.modules["mmar"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
text = torch.tensor({random_text(2, 6).tolist()})
null = torch.tensor({random_text(1, 3, seed=1).tolist()}).repeat(2, 1)
latents = model.generate_images(text, negative_input_ids=null, guidance_scale=2.0, num_ar_steps=3,
    num_inference_steps=4, generator=[torch.Generator().manual_seed(s) for s in (0, 1)], output_type="latent")
print(type(model).__name__, latents.double().sum().item())
"""
    # A home of its own: code of folders is kept there by the folder's name, which is this test's at every run.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    class_name, total = done.stdout.split()
    assert class_name == type(model).__name__
    assert float(total) == pytest.approx(expected.double().sum().item(), abs=1e-4)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"].endswith(f".{class_name}")


# ------------------------------------------------------------------------------------------------------------------ VQ


def test_codes_are_the_tokenizers():
    model = make("vq")
    pixel_values = torch.rand(3, 3, 8, 8, generator=seeded(0)) * 2 - 1
    latents = model.encode_images(pixel_values)
    with torch.no_grad():
        codes = model.vae.quantize(model.vae.encode(pixel_values).latents)[2][2].view(3, 16)
        reconstructed = model.vae(pixel_values).sample
    assert torch.equal(model.codes_of(latents.flatten(2).transpose(1, 2)), codes) and len(codes.unique()) > 1
    torch.testing.assert_close(model.decode_latents(latents), reconstructed)
    # Unit variance over the codebook, and no posterior to sample from.
    torch.testing.assert_close(model.codebook.std(0), torch.ones(4))
    assert torch.equal(model.encode_images(pixel_values, sample_posterior=True), latents)


@torch.no_grad()
def test_code_losses_are_cross_entropies():
    model = make("vq")
    codes, z = torch.tensor([3, 0, 23]), torch.randn(3, 64, generator=seeded(0))
    losses, timesteps = model.image_token_loss(model.codebook[codes], z)
    expected = F.cross_entropy(z @ model.code_head.weight.T + model.code_head.bias, codes, reduction="none")
    torch.testing.assert_close(losses, expected[None])
    assert timesteps.tolist() == [[0, 0, 0]]


@torch.no_grad()
def test_codes_are_drawn_by_guided_logits():
    model = make("vq")
    z, sampler = (
        torch.randn(1, 64, generator=seeded(0)).repeat(4000, 1),
        model.token_samplers(None, {1}, "cpu", 1, True)[1],
    )
    null = torch.randn(1, 64, generator=seeded(1)).repeat(4000, 1)
    drawn = model.codes_of(sampler(torch.cat([z, null]), [2.0], [seeded(0)]))
    logits, null_logits = model.code_head(z[0]), model.code_head(null[0])
    expected = (null_logits + 2 * (logits - null_logits)).softmax(-1)
    shares = torch.bincount(drawn, minlength=24) / 4000
    # Shares of 4,000 draws have a std of at most 0.008.
    assert (shares - expected).abs().max() < 0.035
    assert (expected - logits.softmax(-1)).abs().max() > 0.05


def test_vq_config():
    config = MMARVQConfig()
    assert (config.num_latents, config.latent_channels, config.num_codes) == (256, 8, 16384)
    with pytest.raises(StrictDataclassError, match="num_vq_embeddings"):
        MMARVQConfig(**tiny_arguments() | {"vae_config": {k: v for k, v in VQ.items() if k != "num_vq_embeddings"}})
    # A single code would be NaN at unit variance.
    for name, value in (("num_vq_embeddings", 1), ("num_vq_embeddings", -3), ("vq_embed_dim", "4")):
        with pytest.raises(StrictDataclassError, match=rf"`vae_config\['{name}'\]`"):
            MMARVQConfig(**tiny_arguments() | {"vae_config": VQ | {name: value}})


# --------------------------------------------------------------------------------------------------------- Transfusion


def levels_and_noise(model, latents, mask, seed=0):
    tokens = latents.flatten(2).transpose(1, 2)
    generators = [seeded(seed + i) for i in range(len(latents))]
    captured = {}

    def capture(module, args):
        captured["noisy"], captured["levels"] = args

    handle = model.model.latent_encoder.register_forward_pre_hook(capture)
    try:
        _, targets = model.embed_latents(tokens, mask, generators)
    finally:
        handle.remove()
    return tokens, captured["noisy"], captured["levels"], targets


@torch.no_grad()
def test_noise_by_task():
    """Pictures to draw get levels up to 1000, pictures to read up to 500 in training and none at inference."""
    model = make("transfusion")
    latents = random_latents(model, 1).repeat(400, 1, 1, 1)
    mask = torch.zeros(400, 16, dtype=torch.bool)
    mask[:200] = True
    model.train()
    tokens, noisy, levels, targets = levels_and_noise(model, latents, mask)
    assert levels[:200].max() > 950 and levels[:200].min() < 50
    assert levels[200:].max() <= 500 and levels[200:].max() > 470 and levels[200:].min() < 30
    assert torch.equal(targets[..., -1], levels[:, None].expand(-1, 16).float())
    alpha_bar = torch.tensor([1.0, *model.default_scheduler().alphas_cumprod.tolist()])[levels][:, None, None]
    expected = alpha_bar.sqrt() * tokens + (1 - alpha_bar).sqrt() * targets[..., :-1]
    torch.testing.assert_close(noisy, expected, atol=1e-4, rtol=1e-4)
    model.eval()
    tokens, noisy, levels, _ = levels_and_noise(model, latents[:3], None)
    assert levels.tolist() == [0, 0, 0] and torch.equal(noisy, tokens)
    model.config.understanding_level = 250
    assert levels_and_noise(model, latents[:3], None)[2].tolist() == [250] * 3


@torch.no_grad()
def test_noise_losses():
    model = make("transfusion")
    z, noise = torch.randn(3, 64, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    levels = torch.tensor([0.0, 1.0, 1000.0])
    losses, timesteps = model.image_token_loss(torch.cat([noise, levels[:, None]], -1), z)
    expected = (z @ model.noise_head.weight.T + model.noise_head.bias - noise).square().mean(-1)
    torch.testing.assert_close(losses, expected[None])
    assert timesteps.tolist() == [[0, 0, 999]]


@torch.no_grad()
def test_pictures_are_the_plain_denoising():
    """One pass over text and picture per step and branch, DDPM by hand."""
    model = make("transfusion")
    text, null = random_text(1, 6), random_text(1, 3, seed=1)
    scheduler = model.default_scheduler()
    scheduler.set_timesteps(4)
    generator = seeded(torch.randint(0, 2**63 - 1, (), generator=seeded(0)).item())
    tokens = torch.randn(16, 4, generator=generator)[None]
    marks = torch.full((1, 16), IMAGE)
    for timestep in scheduler.timesteps:
        embeds = model.model.latent_encoder(tokens, timestep[None] + 1)
        noise = []
        for prompt in (text, null):
            ids = torch.cat([prompt, marks], 1)
            output = model.model(ids, image_embeds=embeds, image_token_mask=ids == IMAGE).last_hidden_state
            noise.append(model.noise_head(output[:, -16:]))
        guided = noise[1] + 2.0 * (noise[0] - noise[1])
        tokens = scheduler.step(guided, timestep, tokens, generator=[generator]).prev_sample
    latents = draw(model, 1, generator=[seeded(0)], output_type="latent")
    torch.testing.assert_close(latents.flatten(2).transpose(1, 2), tokens, atol=2e-3, rtol=2e-3)
    assert tokens.std() > 0.1


def test_transfusion_predicts_noise():
    """Else its pictures would be drawn as if it predicted v."""
    config = MMARTransfusionConfig(**tiny_arguments() | {"diffusion_config": {"num_train_timesteps": 500}})
    assert config.diffusion_config.prediction_type == "epsilon" and config.max_understanding_level == 500
    with pytest.raises(StrictDataclassError, match="`diffusion_config.prediction_type`"):
        MMARTransfusionConfig(**tiny_arguments())


def test_what_transfusion_refuses():
    model = make("transfusion")
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    with pytest.raises(ValueError, match="16 .*4"):
        draw(model, latents=random_latents(model, 2), latent_mask=mask)
    for arguments in ({"num_inference_steps": (4, 2)}, {"preset": "balanced", "num_inference_steps": None}):
        with pytest.raises(ValueError, match="`num_inference_steps`"):
            draw(model, **arguments)
    assert torch.isfinite(draw(model, num_inference_steps=np.int64(3))).all()
    with pytest.raises(StrictDataclassError, match="`understanding_level`"):
        MMARTransfusionConfig(**tiny_arguments() | {"diffusion_config": None, "understanding_level": 1001})
    for level in (-5, 1500):
        model.config.understanding_level = level
        with pytest.raises(ValueError, match="`understanding_level`"):
            model.generate(image_marks(model, 1), latents=random_latents(model, 1), max_new_tokens=1)
    assert math.isclose(float(model.alphas_cumprod_of(torch.tensor(0))), 1.0)

"""`generate_images` against the plain implementation of the paper's protocol."""

import pytest
import torch
from helpers import random_latents, random_text, seeded, tiny_model
from reference_mmar import alphas_cumprod, condition, generate_picture


# Latents of the reference are near 1 to 10; float32 against a float64 schedule, over four rounds that feed each other.
ATOL = 3e-5
# One token per step too; guided by 3.
CASES = {"unguided": (1.0, 4, 5), "guided": (3.0, 4, 5), "one token per step": (3.0, 16, 2), "one step": (2.0, 1, 8)}


@pytest.fixture(scope="module")
def model():
    """With small weights in the latent encoder: rounds that feed each other multiply float32's roundings."""
    model = tiny_model()
    for module in model.model.latent_encoder.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)
    return model


def as_tokens(latents):
    return latents.flatten(2).transpose(1, 2)


def test_schedule(model):
    scheduler = model.default_scheduler()
    # float32 products of a thousand factors.
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), torch.tensor(alphas_cumprod(1000)).double(), rtol=1e-4, atol=0
    )


@torch.no_grad()
def test_condition_equals_the_forward_pass(model):
    """The stage before the loop, so that a failure below names the layer."""
    text, latents = random_text(1, 6), random_latents(model, 1)
    hidden = [place % 3 == 0 for place in range(16)]
    z = condition(model, text[0].tolist(), as_tokens(latents)[0], hidden)
    marks = torch.full((1, 16), model.config.image_token_id)
    output = model(torch.cat([text, marks], 1), latents=latents, latent_mask=torch.tensor([hidden]))
    torch.testing.assert_close(output.image_hidden_states[0], z, atol=ATOL, rtol=0)


@pytest.mark.parametrize("guidance_schedule", ["constant", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_generate_images_equals_the_reference(model, case, guidance_schedule):
    guidance_scale, num_ar_steps, num_inference_steps = CASES[case]
    text, null_text = random_text(1, 6), random_text(1, 3, seed=1)
    steps = {"num_ar_steps": num_ar_steps, "num_inference_steps": num_inference_steps}
    latents = model.generate_images(
        text,
        negative_input_ids=null_text,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        generator=[seeded(3)],
        output_type="latent",
        **steps,
    )
    null_text = null_text[0].tolist() if guidance_scale > 1 else None
    expected = generate_picture(
        model,
        text[0].tolist(),
        null_text,
        guidance_scale,
        generator=seeded(3),
        is_linear=guidance_schedule == "linear",
        **steps,
    )
    torch.testing.assert_close(as_tokens(latents)[0], expected, atol=ATOL, rtol=ATOL)
    assert expected.std() > 0.1


def test_left_padded_batch_equals_the_reference(model):
    """Prompts and null prompts of different lengths, each padded on the left with arbitrary ids."""
    text, null_text = random_text(3, 9), random_text(3, 5, seed=1)
    lengths, null_lengths = (9, 4, 6), (2, 5, 1)
    mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths]).long()
    null_mask = torch.stack([torch.arange(5) >= 5 - length for length in null_lengths]).long()
    latents = model.generate_images(
        text,
        attention_mask=mask,
        negative_input_ids=null_text,
        negative_attention_mask=null_mask,
        guidance_scale=2.0,
        num_ar_steps=3,
        num_inference_steps=4,
        generator=[seeded(seed) for seed in range(3)],
        output_type="latent",
    )
    for row in range(3):
        expected = generate_picture(
            model,
            text[row, 9 - lengths[row] :].tolist(),
            null_text[row, 5 - null_lengths[row] :].tolist(),
            2.0,
            num_ar_steps=3,
            num_inference_steps=4,
            generator=seeded(row),
        )
        torch.testing.assert_close(as_tokens(latents)[row], expected, atol=ATOL, rtol=ATOL)


def test_inpainting_equals_the_reference(model):
    text, known = random_text(1, 6), random_latents(model, 1)
    hidden = [place < 9 for place in range(16)]
    steps = {"guidance_scale": 1.0, "num_ar_steps": 3, "num_inference_steps": 4}
    latents = model.generate_images(
        text,
        latents=known,
        latent_mask=torch.tensor([hidden]),
        generator=[seeded(3)],
        output_type="latent",
        **steps,
    )
    expected = generate_picture(
        model, text[0].tolist(), None, known=as_tokens(known)[0], hidden=hidden, generator=seeded(3), **steps
    )
    torch.testing.assert_close(as_tokens(latents)[0], expected, atol=ATOL, rtol=ATOL)


def test_decoded_pictures_are_those_of_the_latents(model):
    arguments = {"guidance_scale": 1.0, "num_ar_steps": 2, "num_inference_steps": 2}
    latents = model.generate_images(random_text(2, 4), generator=seeded(0), output_type="latent", **arguments)
    pictures = model.generate_images(random_text(2, 4), generator=seeded(0), **arguments)
    with torch.no_grad():
        expected = model.vae.decode(latents / 1.5 + 0.25).sample
    # The same division and sum, in the same order.
    assert torch.equal(pictures, expected)

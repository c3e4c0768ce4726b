"""Hidden latents never change any output."""

import pytest
import torch
from helpers import image_marks, random_latents, random_mask, random_text, seeded, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def batch(model):
    """Two rows, the second with two pictures, the first padded on the left."""
    text, marks = random_text(2, 60), image_marks(model, 1)[0]
    rows = [
        torch.cat([torch.zeros(19, dtype=torch.long), text[0, :4], marks, text[0, 4:9]]),
        torch.cat([text[1, :5], marks, text[1, 5:8], marks, text[1, 8:12]]),
    ]
    attention_mask = torch.ones(2, 44, dtype=torch.long)
    attention_mask[0, :19] = 0
    return {"input_ids": torch.stack(rows), "attention_mask": attention_mask}


VALUES = [0.0, -1e4, float("nan"), float("inf")]


@torch.no_grad()
@pytest.mark.parametrize("value", VALUES)
def test_hidden_latents_change_neither_z_nor_logits(model, batch, value):
    latents, mask = random_latents(model, 3), random_mask(model, 3)
    hidden = mask.view(3, 1, 4, 4)
    reference = model.model(**batch, image_embeds=model.model.latent_encoder(latents.flatten(2).transpose(1, 2), mask))
    changed = latents.masked_fill(hidden, value)
    output = model.model(**batch, image_embeds=model.model.latent_encoder(changed.flatten(2).transpose(1, 2), mask))
    assert torch.equal(output.last_hidden_state, reference.last_hidden_state)
    expected = model(**batch, latents=latents, latent_mask=mask)
    output = model(**batch, latents=changed, latent_mask=mask)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.image_hidden_states, expected.image_hidden_states)


@torch.no_grad()
def test_each_known_latent_changes_the_picture_and_the_text_after(model, batch):
    latents, mask = random_latents(model, 3), random_mask(model, 3)
    reference = model(**batch, latents=latents, latent_mask=mask)
    for place in (~mask[0]).nonzero()[:, 0].tolist():
        changed = latents.clone()
        changed[0].view(4, 16)[:, place] += 1.0
        output = model(**batch, latents=changed, latent_mask=mask)
        assert (output.image_hidden_states[0] - reference.image_hidden_states[0]).abs().amax(-1).min() > 1e-5
        assert (output.logits[0, -5:] - reference.logits[0, -5:]).abs().amax(-1).min() > 1e-5
        # The other row's pictures and text are another matter.
        assert torch.equal(output.image_hidden_states[1:], reference.image_hidden_states[1:])
        assert torch.equal(output.logits[1], reference.logits[1])


@torch.no_grad()
def test_hidden_latents_change_no_text_generation(model, batch):
    latents, mask = random_latents(model, 3), random_mask(model, 3)
    changed = latents.masked_fill(mask.view(3, 1, 4, 4), float("nan"))
    arguments = {**batch, "latent_mask": mask, "max_new_tokens": 4, "do_sample": False}
    for settings in ({"num_beams": 2}, {"use_cache": False}):
        reference = model.generate(**arguments, latents=latents, **settings)
        assert torch.equal(model.generate(**arguments, latents=changed, **settings), reference)


@pytest.mark.parametrize("value", [-1e4, float("nan")])
def test_hidden_latents_change_no_generated_picture(model, value):
    latents, mask = random_latents(model, 2), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :10], mask[1, 5:15] = True, True
    text = random_text(2, 7)
    seen: list[list[torch.Tensor]] = []

    def draw(start):
        seen.append([])
        return model.generate_images(
            text,
            negative_input_ids=text[:, :2],
            latents=start,
            latent_mask=mask,
            num_ar_steps=3,
            num_inference_steps=3,
            generator=seeded(3),
            output_type="latent",
            callback=lambda step, steps, partial, hidden: seen[-1].append(partial.clone()),
        )

    assert torch.equal(draw(latents), draw(latents.masked_fill(mask.view(2, 1, 4, 4), value)))
    # Not even the callback sees them.
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_hidden_latents_get_no_gradient_through_z_but_known_ones_do(model, batch):
    latents, mask = random_latents(model, 3).requires_grad_(), random_mask(model, 3)
    output = model(**batch, latents=latents, latent_mask=mask)
    (output.logits.square().sum() + output.image_hidden_states.square().sum()).backward()
    gradient = latents.grad.flatten(2).transpose(1, 2)
    assert not gradient[mask].any()
    assert gradient[~mask].abs().amax(-1).min() > 0

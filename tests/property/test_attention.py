"""Who sees whom: causal text, bidirectional pictures, and nobody sees what comes later."""

import pytest
import torch
from helpers import image_marks, random_latents, random_mask, random_text, tiny_model


# Float32 sums in another order: logits near 10 through three layers, about a hundred roundings of 2^-24.
ATOL = 5e-5


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_model(attn_implementation=request.param)


@pytest.fixture(scope="module")
def sequence(model):
    """Text 0..3, picture 4..19, text 20..22, picture 23..38, text 39..43."""
    text, marks = random_text(1, 12)[0], image_marks(model, 1)[0]
    return torch.cat([text[:4], marks, text[4:7], marks, text[7:12]])[None]


def hidden_states(model, sequence, latents, mask=None, **kwargs):
    tokens = latents.flatten(2).transpose(1, 2)
    with torch.no_grad():
        image_embeds = model.model.latent_encoder(tokens, mask)
        return model.model(sequence, image_embeds=image_embeds, **kwargs).last_hidden_state


def test_attention_implementation_is_the_one_asked_for(model):
    assert model.model.language_model.config._attn_implementation == model.config._attn_implementation


def test_earlier_text_never_changes_with_the_image_and_later_text_does(model, sequence):
    latents = random_latents(model, 2)
    reference = hidden_states(model, sequence, latents)
    first, second = latents.clone(), latents.clone()
    first[0] += 1.0
    second[1] += 1.0
    output = hidden_states(model, sequence, first)
    assert torch.equal(output[:, :4], reference[:, :4])
    # Every later token changes: the picture, the text between, the second picture, the text after.
    assert (output[:, 4:] - reference[:, 4:]).abs().amax(-1).min() > 1e-4
    output = hidden_states(model, sequence, second)
    # The first picture never sees the second, nor does the text between.
    assert torch.equal(output[:, :23], reference[:, :23])
    assert (output[:, 23:] - reference[:, 23:]).abs().amax(-1).min() > 1e-4


def test_earlier_text_equals_text_alone(model, sequence):
    with torch.no_grad():
        alone = model(sequence[:, :4]).logits
        output = model(sequence, latents=random_latents(model, 2)).logits[:, :4]
    torch.testing.assert_close(output, alone, atol=ATOL, rtol=0)


def test_text_is_causal_around_images(model, sequence):
    latents = random_latents(model, 2)
    reference = hidden_states(model, sequence, latents)
    for position in (2, 21, 41):
        changed = sequence.clone()
        changed[0, position] = (changed[0, position] + 1) % 100
        output = hidden_states(model, changed, latents)
        assert torch.equal(output[:, :position], reference[:, :position])
        assert (output[:, position:] - reference[:, position:]).abs().amax(-1).min() > 1e-4


def test_all_tokens_of_one_image_see_each_other(model, sequence):
    """Through the language model, past EmbeddingViT: one changed embedding reaches all sixteen."""
    language_model, mask = model.model.language_model, sequence == model.config.image_token_id
    torch.manual_seed(0)
    embeds = torch.randn(1, 44, 64)
    with torch.no_grad():
        reference = run_embeds(model, embeds, mask)
        for position in (4, 11, 19):
            changed = embeds.clone()
            changed[0, position] += 1.0
            output = run_embeds(model, changed, mask)
            assert torch.equal(output[:, :4], reference[:, :4])
            assert (output[:, 4:] - reference[:, 4:]).abs().amax(-1).min() > 1e-5
        for position in (23, 38):
            changed = embeds.clone()
            changed[0, position] += 1.0
            output = run_embeds(model, changed, mask)
            assert torch.equal(output[:, :23], reference[:, :23])
            assert (output[:, 23:] - reference[:, 23:]).abs().amax(-1).min() > 1e-5
    assert language_model.config.num_hidden_layers == 3


def run_embeds(model, embeds, image_token_mask):
    """The model's own positions and masks around given embeddings."""
    image_embeds = embeds[image_token_mask].view(-1, model.config.num_latents, embeds.shape[-1])
    return model.model(
        inputs_embeds=embeds, image_token_mask=image_token_mask, image_embeds=image_embeds
    ).last_hidden_state


def test_image_tokens_are_equivariant_to_their_order(model, sequence):
    mask = sequence == model.config.image_token_id
    torch.manual_seed(1)
    embeds = torch.randn(1, 44, 64)
    order = torch.arange(44)
    order[4:20] = order[4:20][torch.randperm(16)]
    order[23:39] = order[23:39][torch.randperm(16)]
    assert not torch.equal(order, torch.arange(44))
    with torch.no_grad():
        reference = run_embeds(model, embeds, mask)
        output = run_embeds(model, embeds[:, order], mask)
    # Permuted on the pictures, unchanged on the text.
    torch.testing.assert_close(output, reference[:, order], atol=ATOL, rtol=0)
    text = ~mask[0]
    torch.testing.assert_close(output[:, text], reference[:, text], atol=ATOL, rtol=0)


def test_rows_of_a_batch_do_not_see_each_other(model, sequence):
    latents = random_latents(model, 3)
    text = random_text(1, 44, seed=5)
    one_picture = torch.cat([text[:, :10], image_marks(model, 1), text[:, 10:28]], 1)
    batch = torch.cat([one_picture, text, sequence])
    output = hidden_states(model, batch, latents)
    torch.testing.assert_close(output[:1], hidden_states(model, one_picture, latents[:1]), atol=ATOL, rtol=0)
    torch.testing.assert_close(output[2:], hidden_states(model, sequence, latents[1:]), atol=ATOL, rtol=0)
    with torch.no_grad():
        alone = model.model(text).last_hidden_state
    torch.testing.assert_close(output[1:2], alone, atol=ATOL, rtol=0)


def test_left_padding_changes_nothing(model, sequence):
    latents, mask = random_latents(model, 2), random_mask(model, 2)
    padded = torch.cat([torch.full((1, 5), 7), sequence], 1)
    attention_mask = (torch.arange(49) >= 5).long()[None]
    output = hidden_states(model, padded, latents, mask, attention_mask=attention_mask)
    torch.testing.assert_close(output[:, 5:], hidden_states(model, sequence, latents, mask), atol=ATOL, rtol=0)
    # What the padding holds is never read.
    padded[:, :5] = 9
    assert torch.equal(
        hidden_states(model, padded, latents, mask, attention_mask=attention_mask)[:, 5:], output[:, 5:]
    )


def test_adjacent_images_are_two_blocks(model):
    text, marks = random_text(1, 6), image_marks(model, 1)
    sequence = torch.cat([text[:, :3], marks, marks, text[:, 3:]], 1)
    latents = random_latents(model, 2)
    reference = hidden_states(model, sequence, latents)
    latents[1] += 1.0
    output = hidden_states(model, sequence, latents)
    assert torch.equal(output[:, :19], reference[:, :19])
    assert (output[:, 19:] - reference[:, 19:]).abs().amax(-1).min() > 1e-4


def test_sequence_may_begin_or_end_with_an_image(model):
    text, marks, latents = random_text(1, 5), image_marks(model, 1), random_latents(model, 1)
    begins, ends = torch.cat([marks, text], 1), torch.cat([text, marks], 1)
    for sequence in (begins, ends):
        reference = hidden_states(model, sequence, latents)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), sequence], 1)
        attention_mask = (torch.arange(24) >= 3).long()[None]
        output = hidden_states(model, padded, latents, attention_mask=attention_mask)[:, 3:]
        torch.testing.assert_close(output, reference, atol=ATOL, rtol=0)

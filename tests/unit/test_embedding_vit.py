"""The latent encoder: known tokens only, hidden ones never read, each back in its place."""

import pytest
import torch
from helpers import random_latents, random_mask, tiny_model


# Outputs near 1 through two ViT layers and five linears, summed in another order: tens of float32 roundings.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens(model):
    return random_latents(model, 3).flatten(2).transpose(1, 2)


@torch.no_grad()
def test_nothing_hidden_equals_understanding(model, tokens):
    encoder = model.model.latent_encoder
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(encoder(tokens, mask), encoder(tokens), atol=ATOL, rtol=0)


@torch.no_grad()
def test_hidden_latents_are_never_read(model, tokens):
    encoder = model.model.latent_encoder
    mask = random_mask(model, 3)
    reference = encoder(tokens, mask)
    for value in (0.0, 1e6, float("nan"), float("inf")):
        assert torch.equal(encoder(tokens.masked_fill(mask[..., None], value), mask), reference)


@torch.no_grad()
def test_all_hidden_is_mask_token_plus_positions(model, tokens):
    encoder = model.model.latent_encoder
    expected = encoder.vis_projector(encoder.mask_token + encoder.position_embedding)
    output = encoder(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(output, expected.expand_as(output), atol=ATOL, rtol=0)


@torch.no_grad()
def test_known_tokens_go_back_to_their_places(model, tokens):
    """Picture by picture with plain loops, no padding: the batch must not matter."""
    encoder = model.model.latent_encoder
    mask = random_mask(model, 3)
    mask[1] = True
    mask[2] = False
    assert len(set(mask.sum(-1).tolist())) == 3
    output = encoder(tokens, mask)
    for picture in range(3):
        places = [place for place in range(16) if not mask[picture, place]]
        rows = [encoder.mask_token] * 16
        if places:
            embeddings = encoder.post_projector(tokens[picture : picture + 1, places])
            known = encoder.embedding_vit(embeddings, torch.tensor([places]))[0]
            for row, place in zip(known, places, strict=True):
                rows[place] = row
        expected = encoder.vis_projector(torch.stack(rows) + encoder.position_embedding)
        torch.testing.assert_close(output[picture], expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_vit_is_equivariant_to_the_order_of_its_tokens(model):
    vit = model.model.latent_encoder.embedding_vit
    embeddings, positions = torch.randn(2, 9, 48), torch.stack([torch.randperm(16)[:9] for _ in range(2)])
    order = torch.randperm(9)
    output = vit(embeddings, positions)
    torch.testing.assert_close(vit(embeddings[:, order], positions[:, order]), output[:, order], atol=ATOL, rtol=0)
    # The places matter: another place for one token changes every token.
    moved = positions.clone()
    moved[:, 0] = torch.tensor([next(p for p in range(16) if p not in row) for row in positions.tolist()])
    assert (vit(embeddings, moved) - output).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_padding_slots_are_never_attended_to(model):
    vit = model.model.latent_encoder.embedding_vit
    embeddings, positions = torch.randn(1, 6, 48), torch.arange(6)[None]
    valid = torch.tensor([[True, True, True, True, False, False]])
    padded = vit(embeddings, positions, valid)[:, :4]
    torch.testing.assert_close(padded, vit(embeddings[:, :4], positions[:, :4]), atol=ATOL, rtol=0)
    embeddings[:, 4:] = 1e3
    assert torch.equal(vit(embeddings, positions, valid)[:, :4], padded)


def test_mask_token_gets_no_gradient_in_understanding(model, tokens):
    encoder = model.model.latent_encoder
    encoder.zero_grad()
    encoder(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool)).sum().backward()
    assert encoder.mask_token.grad is None or not encoder.mask_token.grad.any()
    encoder.zero_grad()
    encoder(tokens, random_mask(model, 3)).square().sum().backward()
    assert encoder.mask_token.grad.abs().max() > 0

"""Text-only MMAR is Qwen2, bit for bit."""

import pytest
import torch
from helpers import qwen2_of, random_text, tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request):
    model = tiny_model(text_config={"tie_word_embeddings": request.param})
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == request.param
    return model, qwen2_of(model)


@torch.no_grad()
def test_logits_are_bit_identical(models):
    model, qwen2 = models
    ids = random_text(3, 11)
    output = model(ids, output_hidden_states=True)
    expected = qwen2(ids, output_hidden_states=True)
    for layer, (ours, theirs) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert torch.equal(ours, theirs), f"layer {layer}"
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected.logits)
    assert expected.logits.std() > 0.5


@torch.no_grad()
def test_left_padded_logits_are_bit_identical(models):
    model, qwen2 = models
    ids = random_text(3, 11)
    attention_mask = torch.stack([torch.arange(11) >= missing for missing in (0, 4, 9)]).long()
    # Qwen2 itself needs the positions told; MMAR counts them from the mask.
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    expected = qwen2(ids, attention_mask=attention_mask, position_ids=position_ids).logits
    output = model(ids, attention_mask=attention_mask).logits
    assert torch.equal(output[attention_mask.bool()], expected[attention_mask.bool()])


def test_training_forward_is_bit_identical_and_trains_nothing(models):
    """In training PLoRA runs with an all-False mask, so that ranks with and without images agree."""
    model, qwen2 = models
    ids = random_text(3, 11)
    model.train()
    model.zero_grad()
    try:
        output = model(ids, labels=ids)
        hidden = model.model(ids).last_hidden_state
    finally:
        model.eval()
    assert torch.equal(hidden, qwen2.model(ids).last_hidden_state)
    # Qwen2's loss over all positions at once: the same cross entropy of shifted labels in another order of summation.
    torch.testing.assert_close(output.text_loss, qwen2(ids, labels=ids).loss, rtol=1e-6, atol=0)
    assert output.logits is None and output.image_loss is None
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert not parameter.grad.any(), name
    model.zero_grad()


@torch.no_grad()
def test_greedy_generation_is_the_same(models):
    model, qwen2 = models
    ids = random_text(2, 7)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    expected = qwen2.generate(ids, attention_mask=attention_mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=attention_mask, **settings), expected)


@torch.no_grad()
def test_cached_logits_are_bit_identical(models):
    model, qwen2 = models
    ids = random_text(2, 12)
    ours, theirs = model(ids[:, :8], use_cache=True), qwen2(ids[:, :8], use_cache=True)
    for piece in (ids[:, 8:11], ids[:, 11:]):
        ours = model(piece, past_key_values=ours.past_key_values)
        theirs = qwen2(piece, past_key_values=theirs.past_key_values)
        assert torch.equal(ours.logits, theirs.logits)


@torch.no_grad()
def test_bfloat16_logits_are_bit_identical():
    model = tiny_model().to(torch.bfloat16)
    ids, qwen2 = random_text(2, 9), qwen2_of(model)
    assert qwen2.dtype == torch.bfloat16
    # RoPE's frequencies stay float32 in a model loaded in bfloat16; a cast must not change them either.
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, qwen2.model.rotary_emb.inv_freq)
    assert torch.equal(model(ids).logits, qwen2(ids).logits)

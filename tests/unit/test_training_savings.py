"""
What training leaves out changes neither losses nor gradients: logits without labels, the head on known latents,
gradients of the text before the pictures, PLoRA's branch on text.

The plain computation is that of eval mode: all logits, a mask in every linear, gradients everywhere.
"""

import math
import os
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from helpers import IMAGE, image_marks, random_latents, random_text, seeded, tiny_config, tiny_model
from torch import distributed, nn
from torch.nn import functional as F
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from mmar.benchmarks import training_savings
from mmar.modeling_mmar import modeling_mmar, prefix_mmar
from mmar.modeling_mmar.configuration_mmar import MMARConfig
from mmar.modeling_mmar.diffusion_mmar import cosine_alphas_cumprod
from mmar.modeling_mmar.parameterization_mmar import add_noise, v_target
from mmar.modeling_mmar.plora_mmar import MMARQwen2DecoderLayer, PLoRALinear


# Sums in another order, through three layers and back: about ten roundings of 2^-24, relative to a gradient's norm.
TOLERANCE = 5e-6
# A row's segments, in order: a number of text tokens, or a picture.
PICTURE = "picture"
ROWS = {
    "text to image": [[12, PICTURE], [20, PICTURE], [7, PICTURE]],
    "mixed": [[30, PICTURE], [6, PICTURE, 13], [9, PICTURE]],
    "a row without a picture": [[14, PICTURE], [40], [5, PICTURE, 8]],
    "several pictures": [[10, PICTURE, 3, PICTURE, 4], [8, PICTURE, 11]],
    "one row": [[9, PICTURE, 5]],
}


def make_batch(model, rows, padding_side="left", seed=0):
    """All text is labelled, before pictures too; the last picture is fully known, others have hidden latents."""
    generator = seeded(seed)
    ids = []
    for row in rows:
        parts = [[IMAGE] * 16 if part == PICTURE else random_text(1, part, seed).tolist()[0] for part in row]
        ids.append(torch.tensor(sum(parts, [])))
        seed += 1
    pad = {"batch_first": True, "padding_side": padding_side}
    attention_mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], **pad)
    ids = nn.utils.rnn.pad_sequence(ids, **pad)
    # Nothing is learned from padding: a row's first token, which would be, has no label.
    is_first = (attention_mask == 1) & (F.pad(attention_mask, (1, -1)) == 0)
    batch = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "labels": ids.masked_fill((ids == IMAGE) | (attention_mask == 0) | is_first, -100),
    }
    num_images = sum(row.count(PICTURE) for row in rows)
    if num_images:
        batch["latents"] = random_latents(model, num_images)
        batch["latent_mask"] = torch.rand(num_images, 16, generator=generator) < 0.6
        batch["latent_mask"][-1] = num_images == 1
    return batch


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    output = model(**batch, **kwargs, generator=seeded(3))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance=TOLERANCE):
    (output, gradients), (plain, plain_gradients) = got, expected
    for name in ("loss", "text_loss", "image_loss"):
        loss, plain_loss = getattr(output, name), getattr(plain, name)
        if plain_loss is None:
            assert loss is None, name
        else:
            torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=0)
    assert_same_gradients(gradients, plain_gradients, tolerance)


def assert_same_gradients(gradients, expected, tolerance=TOLERANCE):
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        # What is zero but for rounding, such as a key's bias, has no relative error.
        norm = max(float(gradient.norm()), 1e-4 * largest)
        assert float((gradients[name] - gradient).norm()) <= tolerance * norm, name
    # In eval mode, a part that a batch leaves out has no gradient; in training it is zero.
    for name in gradients.keys() - expected.keys():
        assert not gradients[name].any(), name


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def used(monkeypatch):
    """The lengths of the prefixes that forward passes took."""
    lengths = []

    def spy(*args):
        lengths.append(prefix_mmar.num_prefix_tokens(*args))
        return lengths[-1]

    monkeypatch.setattr(modeling_mmar, "num_prefix_tokens", spy)
    return lengths


# ------------------------------------------------------------------------------------------------- labelled positions


def test_labelled_positions_give_the_gradients_of_all_logits(model):
    model.freeze(train_backbone=True)  # the lm_head and the embeddings, which it is tied to, among them
    batch = make_batch(model, ROWS["mixed"])
    batch["labels"][:, :20] = -100
    del batch["latent_mask"]
    logits = model(**batch).logits
    # As in transformers: all logits, shifted, and labels of -100 ignored.
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    output, gradients = loss_and_gradients(model.train(), batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, plain, rtol=TOLERANCE, atol=0)
    assert_same_gradients(gradients, expected)
    assert gradients["model.language_model.embed_tokens.weight"].any()


# ------------------------------------------------------------------------------------------------------ hidden tokens


def test_head_on_hidden_tokens_gives_the_gradients_of_the_head_on_all(model):
    batch = make_batch(model, ROWS["mixed"])
    hidden = batch["latent_mask"]
    del batch["labels"]
    diffusion = model.config.diffusion_config
    mul, steps = diffusion.diffusion_batch_mul, diffusion.num_train_timesteps
    z = model(**{**batch, "latent_mask": hidden}, generator=seeded(3)).image_hidden_states
    tokens = batch["latents"].flatten(2).transpose(1, 2)
    # The noise of hidden tokens in their order; known ones get any, their losses are masked.
    generator = seeded(3)
    drawn_timesteps = torch.randint(0, steps, (mul, int(hidden.sum())), generator=generator)
    drawn_noise = torch.randn(mul, int(hidden.sum()), 4, generator=generator)
    timesteps, noise = torch.full((mul, 3, 16), 7), torch.ones(mul, 3, 16, 4)
    timesteps[:, hidden], noise[:, hidden] = drawn_timesteps, drawn_noise
    alphas_cumprod_t = cosine_alphas_cumprod(steps)[timesteps][..., None]
    noisy = add_noise(tokens.expand_as(noise), noise, alphas_cumprod_t)
    prediction = model.diffusion_mlp(
        noisy.flatten(0, 2), timesteps.flatten(), z.expand(mul, -1, -1, -1).flatten(0, 2)
    ).view_as(noise)
    errors = (prediction - v_target(tokens.expand_as(noise), noise, alphas_cumprod_t)).square().mean(-1)
    plain = (errors * hidden).sum() / (mul * hidden.sum())
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    output, gradients = loss_and_gradients(model.train(), batch)
    torch.testing.assert_close(output.loss, plain, rtol=TOLERANCE, atol=0)
    assert_same_gradients(gradients, expected)
    assert all(gradients[name].any() for name in expected if name.startswith("diffusion_mlp"))


# -------------------------------------------------------------------------------------------------------- text prefix


CHECKPOINTING = {"no checkpointing": None, "checkpointing": False, "reentrant checkpointing": True}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("rows", ROWS)
def test_prefix_changes_no_gradient(model, used, rows, checkpointing):
    batch = make_batch(model, ROWS[rows])
    expected = loss_and_gradients(model, batch)
    model.train()
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    assert_same(loss_and_gradients(model, batch), expected)
    is_image = batch["input_ids"] == IMAGE
    assert used == [int(is_image.any(0).nonzero()[0])] and used[0] >= 6


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prefix_with_either_attention_and_padding(used, attn_implementation, padding_side):
    model = tiny_model(attn_implementation=attn_implementation)
    batch = make_batch(model, ROWS["mixed"], padding_side)
    expected = loss_and_gradients(model, batch)
    assert_same(loss_and_gradients(model.train(), batch), expected)
    # Left padded, the first row's text and picture, 46 columns, end where the second row's picture and answer do.
    assert used == [17 if padding_side == "left" else 6]


def test_prefix_without_labels_and_from_embeddings(model, used):
    batch = make_batch(model, ROWS["text to image"])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {name: batch[name] for name in ("attention_mask", "latents", "latent_mask")}
    inputs |= {"inputs_embeds": embeds, "image_token_mask": batch["input_ids"] == IMAGE}
    expected = loss_and_gradients(model, inputs)
    assert_same(loss_and_gradients(model.train(), inputs), expected)
    assert used == [20]


def test_outputs_with_a_prefix_are_those_without(model, used):
    batch = make_batch(model, ROWS["mixed"])
    with torch.no_grad():
        plain = model(**batch, output_hidden_states=True, use_cache=True)
    output = model.train()(**batch, output_hidden_states=True, use_cache=True)
    assert used == [17]
    assert len(output.hidden_states) == len(plain.hidden_states) == 4
    for layer in range(3):
        for name, got, expected in (
            ("hidden states", output.hidden_states[layer + 1], plain.hidden_states[layer + 1]),
            ("keys", output.past_key_values.layers[layer].keys, plain.past_key_values.layers[layer].keys),
            ("values", output.past_key_values.layers[layer].values, plain.past_key_values.layers[layer].values),
        ):
            # Values up to about 10.
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0, msg=f"{name} of layer {layer}")


def test_layers_keep_nothing_for_the_prefix(model):
    """Linears see it without gradients, and gradient checkpointing does not compute its MLP again."""
    batch = make_batch(model, ROWS["text to image"])  # 36 columns, 20 of them before the pictures
    seen = []
    mlp = model.model.language_model.layers[1].mlp
    mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], torch.is_grad_enabled())))
    model.train()
    loss_and_gradients(model, batch)
    assert seen == [(16, True), (20, False)]
    model.activation_checkpointing_enable()
    loss_and_gradients(model, batch)
    assert seen[2:] == [(16, True), (20, False), (16, True)]


def test_no_prefix_where_something_of_the_language_model_is_trained(model, used):
    batch = make_batch(model, ROWS["text to image"])
    layer = model.model.language_model.layers[1]
    parameters = {
        "weight": layer.mlp.down_proj.weight,
        "norm": layer.input_layernorm.weight,
        "embeddings": model.get_input_embeddings().weight,
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        expected = loss_and_gradients(model.eval(), batch)
        assert_same(loss_and_gradients(model.train(), batch), expected)
        assert parameter.grad.any()
        assert used == ([] if name == "embeddings" else [0])  # trained embeddings end it before it is asked
        used.clear()
        parameter.requires_grad_(False)
    loss_and_gradients(model, batch)
    assert used == [20]


def test_no_prefix_under_a_lora_that_is_trained(model, used):
    peft = pytest.importorskip("peft")
    batch = make_batch(model, ROWS["text to image"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = loss_and_gradients(adapted.eval(), batch)
    assert_same(loss_and_gradients(adapted.train(), batch), expected)
    assert used == [0]
    assert sum("lora_" in name for name in expected[1]) == 3 * 2 * 2
    # Frozen, and PLoRA trained again: a part of what does not change.
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" not in name and name.endswith(("image_A", "image_B")))
    expected = loss_and_gradients(adapted.eval(), batch)
    assert_same(loss_and_gradients(adapted.train(), batch), expected)
    assert used == [0, 20]


def test_no_prefix_where_embeddings_are_trained(model, used):
    batch = make_batch(model, ROWS["text to image"])
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    is_image = batch["labels"].new_tensor([[c >= 20 for c in range(36)]] * 3, dtype=torch.bool)
    prompt = torch.zeros_like(embeds[:1, :4]).requires_grad_()
    gradients = []
    for train in (False, True):
        changed = torch.cat([embeds[:, :16], embeds[:, 16:20] + prompt, embeds[:, 20:]], dim=1)
        prompt.grad = None
        loss_and_gradients(model.train(train), batch, inputs_embeds=changed, image_token_mask=is_image)
        gradients.append(prompt.grad)
    assert used == []  # nothing to ask
    assert gradients[0].any()
    assert_same_gradients({"prompt": gradients[1]}, {"prompt": gradients[0]})


def test_no_prefix_where_it_would_not_be_exact_or_not_pay(model, used, monkeypatch):
    model.train()
    batch = make_batch(model, ROWS["text to image"])
    dense = torch.ones(3, 1, 36, 36, dtype=torch.bool)  # text that sees the picture behind it
    model(**{**batch, "attention_mask": dense})
    attentions = tiny_model(attn_implementation="eager").train()(**batch, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(3, 4, 36, 36)] * 3
    model(**make_batch(model, [[PICTURE, 9], [12, PICTURE]], padding_side="right"))
    with torch.no_grad():
        model(**batch)
    assert used == [0] * 4
    # 20 of 36 columns.
    for share, length in ((20 / 36, 20), (math.nextafter(20 / 36, 1), 0)):
        monkeypatch.setattr(prefix_mmar, "MIN_PREFIX_SHARE", share)
        model(**batch)
        assert used.pop() == length


def test_no_prefix_behind_a_cache(model, used):
    model.train()
    text = random_text(2, 5)
    cache = model(text, use_cache=True).past_key_values
    used.clear()
    ids = torch.cat([random_text(2, 8, seed=1), image_marks(model, 2)], 1)
    assert torch.isfinite(model(ids, latents=random_latents(model, 2), past_key_values=cache).logits).all()
    assert used == []


def weight_only_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(weight_only_int8, marks=pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")),
        pytest.param(nf4, marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")),
    ],
)
def test_prefix_on_a_quantized_backbone(model, used, tmp_path, quantization):
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, quantization_config=quantization())
    for rows in ("mixed", "text to image"):
        batch = make_batch(model, ROWS[rows])
        expected = loss_and_gradients(model.eval(), batch)
        assert_same(loss_and_gradients(model.train(), batch), expected)
    assert used == [17, 20]


def test_prefix_in_bfloat16(model, used):
    batch = make_batch(model, ROWS["mixed"])
    reference = loss_and_gradients(model, batch)
    errors = []
    for train in (False, True):
        model.train(train)
        with torch.autocast("cpu", torch.bfloat16):
            output, gradients = loss_and_gradients(model, batch)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors.append(
            {
                name: float((gradients[name] - gradient).norm() / gradient.norm())
                for name, gradient in reference[1].items()
                if gradient.norm() > 1e-3
            }
        )
    assert used == [17]
    plain, saved = errors
    assert 1e-3 < max(plain.values())  # autocast was at work
    for name in plain:
        assert saved[name] < 2 * plain[name] + 1e-3, name


# ------------------------------------------------------------------------------------------ PLoRA on image tokens only


@pytest.fixture
def linear():
    torch.manual_seed(0)
    linear = PLoRALinear(6, 5, rank=3, alpha=6.0).double()
    nn.init.normal_(linear.image_B)
    return linear


MASK = torch.tensor([[True, False, True, False], [False, False, True, True]])


def test_branch_by_number_is_the_masked_branch(linear):
    results = []
    for image_tokens in (MASK, MASK.flatten().nonzero()[:, 0]):
        x = torch.randn(2, 4, 6, dtype=torch.double, generator=seeded(0), requires_grad=True)
        linear.zero_grad()
        output = linear(x, image_tokens)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(p.grad for p in linear.parameters())])
    for masked, numbered in zip(*results, strict=True):
        torch.testing.assert_close(numbered, masked, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 4, 6, dtype=torch.double)
    numbers = MASK.flatten().nonzero()[:, 0]
    assert torch.equal(linear(x, numbers)[~MASK], linear(x)[~MASK])


def test_backward_of_the_branch(linear):
    x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    numbers = MASK.flatten().nonzero()[:, 0]

    def run(x, *parameters):
        return torch.func.functional_call(
            linear, dict(zip(dict(linear.named_parameters()), parameters, strict=True)), (x, numbers)
        )

    assert torch.autograd.gradcheck(run, (x, *linear.parameters()))


def test_no_image_token_gives_the_base_and_zero_gradients(linear):
    x = torch.randn(2, 4, 6, dtype=torch.double)
    output = linear(x, torch.empty(0, dtype=torch.long))
    assert torch.equal(output, linear(x))
    output.sum().backward()
    assert not linear.image_A.grad.any() and not linear.image_B.grad.any()


def test_text_that_overflows_does_not_reach_the_branch(linear):
    x = torch.zeros(2, 4, 6, dtype=torch.double)
    x[~MASK] = float("inf")
    linear(x, MASK.flatten().nonzero()[:, 0])[MASK].sum().backward()
    assert torch.isfinite(linear.image_A.grad).all() and torch.isfinite(linear.image_B.grad).all()


def test_branch_by_number_keeps_no_copy_of_its_inputs():
    torch.manual_seed(0)
    linear = PLoRALinear(64, 64, rank=2, alpha=1.0).requires_grad_(False)
    linear.image_A.requires_grad_(True), linear.image_B.requires_grad_(True)
    sizes = []
    for image_tokens in (MASK, MASK.flatten().nonzero()[:, 0]):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(2, 4, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = linear(x, image_tokens)
        output.sum().backward()
        sizes.append(sum(kept.values()))
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_layer(autocast):
    """One graph for prefixes and numbers of image tokens of any size; traced, and not translated to C++."""
    torch._dynamo.reset()
    model = tiny_model(text_config={"num_hidden_layers": 1}).train()
    batches = [make_batch(model, [[9 + i, PICTURE, i], [20, PICTURE, 4]]) for i in range(3)]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        expected = [loss_and_gradients(model, batch, use_cache=False) for batch in batches]
        layer = model.model.language_model.layers[0]
        assert type(layer) is MMARQwen2DecoderLayer
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        for batch, plain in zip(batches, expected, strict=True):
            assert_same(loss_and_gradients(model, batch, use_cache=False), plain, 2e-2 if autocast else TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_benchmark_compares_equal_computations():
    config = tiny_config(text_config={"vocab_size": 512})
    comparisons = [
        training_savings.labelled_positions(config),
        *training_savings.branch_by_number(config, num_layers=2),
        *training_savings.text_prefix(config, num_layers=2),
        training_savings.both_in_the_language_model(config, num_layers=2),
        *training_savings.merged_weights(config),
    ]
    for comparison in comparisons:
        torch.testing.assert_close(comparison.saving(), comparison.plain(), rtol=TOLERANCE, atol=0)
        result = training_savings.compare(comparison, num_runs=1)
        assert min(result.seconds) > 0 and min(result.kept) > 0
        assert result.kept[1] <= result.kept[0] or comparison.name.startswith("merged"), comparison.name


def test_multiply_adds_of_merging():
    """By hand: 14.9 M weights in a layer's linears of MMAR-0.5B, 11.8 M in its branches (282 M in 24 layers)."""
    macs = training_savings.macs_of_merging(MMARConfig())
    base = 896 * (2 * 896 + 2 * 128 + 3 * 4864)
    branch = 512 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert round(24 * branch / 1e6) == 282
    assert macs["branch"] == 2 * base + 3 * branch and macs["merged"] == 3 * base
    tokens = 256 * macs["pictures"]
    assert macs["merged"] * tokens + macs["fixed"] == pytest.approx(macs["branch"] * tokens)


# -------------------------------------------------------------------------------------------------- several processes

# What shards its weights: whole layers, as accelerate and transformers set FSDP2 up, or also the MLPs within, where
# ranks must not differ in how often they call one.
SHARDED = ("layers", "mlps")


def _train_sharded(rank, rendezvous, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    lengths = []

    def spy(*args):
        lengths.append(prefix_mmar.num_prefix_tokens(*args))
        return lengths[-1]

    modeling_mmar.num_prefix_tokens = spy
    for sharded in SHARDED:
        model = tiny_model(text_config={"num_hidden_layers": 2}).train()
        for layer in model.model.language_model.layers:
            if sharded == "mlps":
                fully_shard(layer.mlp)
            fully_shard(layer)
        fully_shard(model)
        lengths.clear()
        # One rank's pictures come first, the other's after a long text.
        batch = make_batch(model, [[PICTURE, 9]] if rank == 0 else [[24, PICTURE]])
        _, gradients = loss_and_gradients(model, batch)
        gradients = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
        if rank == 0:
            torch.save(gradients, f"{folder}/{sharded}.pt")
        lengths_of_all = [None, None]
        distributed.all_gather_object(lengths_of_all, lengths)
        assert lengths_of_all == [[0], [24 if sharded == "layers" else 0]], lengths_of_all
    distributed.barrier()
    # Not by way of the interpreter's end, where gloo's threads aborted 11 of 40 runs (torch 2.13).
    os._exit(0)


def test_ranks_with_and_without_a_prefix_agree_under_fsdp2(tmp_path):
    processes = torch.multiprocessing.spawn(
        _train_sharded, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, join=False
    )
    while not processes.join(timeout=300):
        pass
    model = tiny_model(text_config={"num_hidden_layers": 2})
    batches = [make_batch(model, rows) for rows in ([[PICTURE, 9]], [[24, PICTURE]])]
    of_ranks = [loss_and_gradients(model, batch)[1] for batch in batches]
    names = of_ranks[0].keys() | of_ranks[1].keys()
    expected = {name: sum(gradients.get(name, 0) for gradients in of_ranks) / 2 for name in names}
    for sharded in SHARDED:
        assert_same_gradients(torch.load(tmp_path / f"{sharded}.pt"), expected)

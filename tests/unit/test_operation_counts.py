"""
What one picture costs, counted and not timed: multiply-adds of its linears, operators of a diffusion step, and that
nothing within the loops waits for the device.
"""

from collections import Counter

import pytest
import torch
from helpers import random_text, seeded, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmar.modeling_mmar.masking_mmar import tokens_per_step


# The host asks the device for a value, or for how many there are.
WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique")
# Views and places: nothing is launched.
NO_KERNELS = (
    "view",
    "t",
    "select",
    "slice",
    "split",
    "alias",
    "_unsafe_view",
    "unbind",
    "detach",
    "expand",
    "new_empty",
)
NUM_TEXT, NUM_ROUNDS, NUM_STEPS = 6, 4, 5


class Operators(TorchDispatchMode):
    """Counts operators by name, and the multiply-adds of matrix products that linears are made of."""

    def __init__(self):
        super().__init__()
        self.names, self.multiply_adds = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += 1
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))

    def waiting(self):
        return {name: number for name, number in self.names.items() if name in WAITING}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def weights(module):
    """Multiply-adds of one row through all linears of a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def draw(model, guided=True):
    guidance = {"guidance_scale": 2.0, "negative_input_ids": random_text(1, 3)} if guided else {"guidance_scale": 1.0}
    return model.generate_images(
        random_text(1, NUM_TEXT),
        **guidance,
        num_ar_steps=NUM_ROUNDS,
        num_inference_steps=NUM_STEPS,
        generator=[seeded(0)],
        output_type="latent",
    )


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_multiply_adds_of_a_picture(model, guided):
    model.fuse_plora()
    draw(model, guided)  # reads the schedule
    with Operators() as operators:
        draw(model, guided)
    branches, num_latents = 2 if guided else 1, model.config.num_latents
    layers, encoder, head = model.model.language_model.layers, model.model.latent_encoder, model.diffusion_mlp
    # The text once, through every layer, by the weights of text.
    expected = branches * NUM_TEXT * sum(weights(layer) for layer in layers)
    # The timesteps once; their modulations for all steps of a round at once.
    expected += NUM_STEPS * weights(head.timestep_embedding)
    modulations = sum(weights(block.modulation) for block in head.blocks) + weights(head.final_modulation)
    per_step = weights(head) - modulations - weights(head.timestep_embedding) - weights(head.condition_projection)
    keys = layers[-1].self_attn.k_proj.weight.numel() + layers[-1].self_attn.v_proj.weight.numel()
    known = 0
    for count in tokens_per_step(num_latents, NUM_ROUNDS):
        # Known tokens once for both branches.
        expected += known * (weights(encoder.post_projector) + weights(encoder.embedding_vit))
        expected += num_latents * weights(encoder.vis_projector)
        # Each image token passes one weight per linear; the last layer keeps what is wanted.
        expected += branches * num_latents * (sum(weights(layer) for layer in layers[:-1]) + keys)
        expected += branches * count * (weights(layers[-1]) - keys)
        expected += branches * count * weights(head.condition_projection)
        expected += branches * count * NUM_STEPS * (modulations + per_step)
        known += count
    # `weights` leaves PLoRA's factors out: merged, they cost nothing; and no token passes the lm_head.
    assert operators.multiply_adds == expected


@torch.no_grad()
def test_operators_of_a_diffusion_step(model):
    """The difference of seven steps and six: no more than six of each block and twelve around."""
    z, counts = torch.randn(2, 64, generator=seeded(0)), []
    for num_steps in (6, 7):
        sampler = model.token_samplers(model.default_scheduler(), {num_steps}, z.device, 2, fast=True)[num_steps]
        with Operators() as operators:
            sampler(z, [2.0] * num_steps, [seeded(0)])
        assert not operators.waiting()
        counts.append(Counter({name: n for name, n in operators.names.items() if name not in NO_KERNELS}))
    added = counts[1] - counts[0]
    # Without 16 channels the noise is drawn token by token, as the generator's contract has it.
    added.pop("randn", None)
    num_blocks = len(model.diffusion_mlp.blocks)
    assert sum(added.values()) <= 6 * num_blocks + 12, added
    assert added["addmm"] == 2 * num_blocks + 2 and added["native_layer_norm"] == num_blocks + 1


@torch.no_grad()
def test_nothing_waits_within_an_autoregressive_step(model):
    num_latents = model.config.num_latents
    context = model.text_context(random_text(2, 5), torch.ones(2, 5, dtype=torch.long), fast=True)
    tokens = torch.randn(1, num_latents, model.config.latent_channels, generator=seeded(0))
    hidden = torch.arange(num_latents)[None] >= 5
    with Operators() as operators:
        embeds = model.model.latent_encoder(tokens, hidden, 5)
        context.condition(embeds.repeat(2, 1, 1), torch.tensor([[7], [7]]))
    assert not operators.waiting()
    # No turn of queries and keys, and no mask where nothing is padded.
    assert "cos" not in operators.names and "neg" not in operators.names

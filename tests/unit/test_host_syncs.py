"""How often a training micro-batch waits for the device: each question that the host asks stops what it launches."""

from collections import Counter

import pytest
import torch
from helpers import image_marks, random_latents, random_mask, random_text, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode


WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique")


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += name in WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("images", ["latents", "pixel_values"])
def test_forward_and_backward_of_a_training_micro_batch(images):
    model = tiny_model().train()
    text = random_text(2, 20)
    input_ids = torch.cat([text[:, :8], image_marks(model, 2), text[:, 8:]], 1)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.where(torch.arange(input_ids.shape[1]) >= 30, input_ids, -100),
        "latents": random_latents(model, 2),
        "latent_mask": random_mask(model, 2),
        "generator": [torch.Generator().manual_seed(seed) for seed in range(2)],
    }
    if images == "pixel_values":
        batch["pixel_values"] = model.decode_latents(batch.pop("latents")).clamp(-1, 1)
    with Waits() as waits:
        output = model(**batch)
        output.loss.backward()
    assert output.text_loss is not None and output.image_loss is not None
    assert waits.names.total() <= 3, waits.names

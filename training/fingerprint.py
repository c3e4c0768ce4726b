"""What tells one model's weights from another's."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(about: Any, weights: Mapping[str, Tensor]) -> str:
    r"""
    Args:
        about (`Any`): What else belongs to the identity, such as a config; read as JSON.
        weights (`Mapping[str, torch.Tensor]`): Tensors of any shape by their names, on any device.

    Returns:
        `str`: SHA-256, in hex, of `about` and of the weights, in their own dtype and in the order of their names.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

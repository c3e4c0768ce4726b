"""
Linears on a CPU by oneDNN, with weights in the order that it reads them in.

torch gives float32 products to MKL, which reads weights as they lie and is slow on processors of other makers;
bfloat16 products it gives to oneDNN, which puts the weights in order anew in each call. In generation weights stay, so
that they are put in order once. benchmarks/generation.py measures it.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# Least multiply-adds of a call, and least rows, that pay for calling the operator; ours, measured on an AMD EPYC.
MIN_MULTIPLY_ADDS, MIN_ROWS = 2**20, 2
# Largest difference that is rounding, in a product of a few numbers near 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}


class PackedLinear:
    r"""
    `x W^T + b` for weights that stay, without gradients: packed for oneDNN where that pays, else as they are.

    Args:
        weight (`torch.FloatTensor` of shape `(out, in)`): W.
        bias (`torch.FloatTensor` of shape `(out,)`, *optional*): b.
        num_rows (`int`): Of x, about.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, num_rows: int):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.is_packed = pays(weight, num_rows)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), num_rows)

    def __deepcopy__(self, memo: dict) -> "PackedLinear":
        # It does not change, and torch cannot copy packed weights.
        return self

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs `(..., in)` to `(..., out)`."""
        if not self.is_packed:
            return F.linear(inputs, self.weight, self.bias)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.weight.dtype)
        if len(rows) == 0:
            return rows.new_empty(*inputs.shape[:-1], self.weight.shape[0])
        output = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return output.view(*inputs.shape[:-1], -1)


class PackedForward(PackedLinear):
    r"""
    In place of a linear's `forward` while pictures are drawn: packed, but for who follows gradients. A copy of the
    linear, and a pickled one, gets its own `forward`, whose weights may change.

    Args:
        linear (`nn.Linear`): It.
        num_rows (`int`): Of its inputs, about.
    """

    def __init__(self, linear: nn.Linear, num_rows: int):
        super().__init__(linear.weight, linear.bias, num_rows=num_rows)
        self.linear = linear

    def __deepcopy__(self, memo: dict) -> MethodType:
        return MethodType(nn.Linear.forward, copy.deepcopy(self.linear, memo))

    def __reduce__(self) -> tuple:
        # Read before the linear has its state back, and with it this attribute: its class's.
        return getattr, (self.linear, "forward")

    def __call__(self, inputs: Tensor) -> Tensor:
        # Another thread may be training the same model.
        return nn.Linear.forward(self.linear, inputs) if torch.is_grad_enabled() else super().__call__(inputs)


def is_copied_forward(linear: nn.Linear) -> bool:
    """Whether a linear's own `forward` is what `PackedForward` left in a copy: that of its class."""
    return getattr(vars(linear).get("forward"), "__func__", None) is nn.Linear.forward


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have oneDNN's packed linears for a dtype, which are not public, and right."""
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    num_rows = 3
    weight = torch.linspace(-1, 1, 32 * 16, device="cpu").view(32, 16).to(dtype)
    inputs = torch.linspace(-1, 1, num_rows * 16, device="cpu").view(num_rows, 16).to(dtype)
    bias = torch.linspace(0, 1, 32, device="cpu").to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        output = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = F.linear(inputs.double(), weight.double(), bias.double())
    return output.dtype == dtype and bool((output - expected).abs().max() < TOLERANCE[dtype])


def pays(weight: Tensor, num_rows: int) -> bool:
    """Whether a weight can be packed, and packed products of so many rows are faster."""
    is_large = num_rows >= MIN_ROWS and num_rows * weight.numel() >= MIN_MULTIPLY_ADDS
    return is_large and weight.device.type == "cpu" and torch.backends.mkldnn.enabled and can_pack(weight.dtype)


@contextlib.contextmanager
def packed_linears(module: nn.Module, num_rows: int) -> Iterator[None]:
    """
    Within, a module's linears run packed where that pays and no gradients are wanted; those with hooks of accelerate
    stay as they are.
    """
    packed = []
    try:
        for linear in module.modules():
            is_plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
            has_own_forward = "forward" in vars(linear) and not is_copied_forward(linear)
            if not is_plain or has_own_forward or type(linear.weight) is not nn.Parameter:
                continue
            if pays(linear.weight, num_rows) and not torch.is_autocast_enabled("cpu"):
                linear.forward = PackedForward(linear, num_rows)
                packed.append(linear)
        yield
    finally:
        for linear in packed:
            # Another thread may have been faster.
            vars(linear).pop("forward", None)

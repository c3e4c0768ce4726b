"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


# Tables, and the first and last layers that read or write data: Muon is for the matrices between (Jordan, 2024).
NOT_HIDDEN = ("embed_tokens", "position_embedding", "lm_head", "input_projection", "output_projection")


class ChainedOptimizer(Optimizer):
    r"""
    Several optimizers that step together; their groups are the groups of the chain, so that one schedule drives all.

    Args:
        optimizers (`list[Optimizer]`): Over disjoint parameters.
    """

    def __init__(self, optimizers: list[Optimizer]):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each optimizer."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        r"""
        Raises:
            ValueError: If the state is that of another optimizer.
        """
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"expected the states of {len(self.optimizers)} chained optimizers; got {len(states)}. Resume with "
                "the same `muon_learning_rate`."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        # Loading makes new groups.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def muon_with_adamw(
    model: nn.Module,
    decay_names: list[str],
    muon_learning_rate: float,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> ChainedOptimizer:
    r"""
    Muon on the hidden matrices, AdamW on vectors, tables and the layers that read or write data.

    Args:
        model (`nn.Module`): Its trainable parameters are taken.
        decay_names (`list[str]`): Names of the parameters with weight decay.
        muon_learning_rate (`float`): Muon's, in AdamW's units: updates are scaled to the root mean square of AdamW's.
        learning_rate (`float`), betas (`tuple[float, float]`), eps (`float`): AdamW's.
        weight_decay (`float`): In proportion to the learning rate, as AdamW's.

    Returns:
        `ChainedOptimizer`

    Raises:
        ValueError: If torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"`muon_learning_rate` needs torch 2.9 or newer; got {torch.__version__}. Set it to 0.")
    hidden, others = [], {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN):
            hidden.append(parameter)
        else:
            others[name in decay_names].append(parameter)
    muon = torch.optim.Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": others[True], "weight_decay": weight_decay},
        {"params": others[False], "weight_decay": 0.0},
    ]
    return ChainedOptimizer([muon, torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)])

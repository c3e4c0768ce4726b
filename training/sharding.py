"""
Weights sharded over ranks with FSDP2, on any device.

accelerate's FSDP needs a GPU and shards frozen weights with the trained ones; here frozen weights may stay whole on
every rank, so that none of them is gathered in each layer and pass. Checkpoints are those of an unsharded training.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..modeling_mmar.modeling_mmar import MMARPreTrainedModel


SHARD_CHOICES = ("none", "trained", "all")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def mixed_precision(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    r"""
    What FSDP2 sends: weights in `dtype`, gradients in float32. Inputs and outputs stay as they are: latents, noise and
    losses are float32, and autocast sees to the layers.

    Args:
        dtype (`torch.dtype`, *optional*): Of autocast; None without one.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard_model(
    model: nn.Module, device: torch.device, shard_frozen: bool = False, dtype: torch.dtype | None = None
) -> None:
    r"""
    Shards a model's weights over all ranks, layer by layer, in place.

    Args:
        model (`MMARForConditionalGeneration`): Frozen as it will be trained.
        device (`torch.device`): Of this rank.
        shard_frozen (`bool`, *optional*, defaults to `False`): Shard frozen weights too.
        dtype (`torch.dtype`, *optional*): In which weights are gathered; their own by default.

    Raises:
        ValueError: If there is one process only.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        raise ValueError(
            "`shard` needs at least two processes; got one. Launch with torchrun or accelerate, or set `shard=none`."
        )
    model.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # The VAE is frozen and in float32 beside weights that may not be: it is never sharded.
    frozen = set(model.vae.parameters())
    if not shard_frozen:
        frozen |= {parameter for parameter in model.parameters() if not parameter.requires_grad}
    options = {"mesh": mesh, "ignored_params": frozen, "mp_policy": mixed_precision(dtype)}
    for module in reversed(list(model.modules())):
        # Of the class: a model's own list has the VAE's blocks too.
        if type(module).__name__ in MMARPreTrainedModel._no_split_modules:
            fully_shard(module, **options)
    fully_shard(model, **options)
    # transformers' marks of a model that needs no wrapper.
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model, on the first rank's CPU; every rank must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_sharded(model: nn.Module, folder: str | Path) -> None:
    """Loads the weights of a checkpoint, each rank its shards of them."""
    weights: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        weights |= load_file(path)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of a sharded model's optimizer by the parameters' names; every rank must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _plain(optimizer), options=options)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, of a sharded training or not, into an optimizer of either kind."""
    by_name = any(isinstance(key, str) for key in state["state"])
    if not by_name and not is_sharded(model):
        optimizer.load_state_dict(state)
        return
    if not by_name:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        numbered = [names[id(p)] for group in _plain(optimizer).param_groups for p in group["params"]]
        groups = [group | {"params": [numbered[i] for i in group["params"]]} for group in state["param_groups"]]
        state = {"state": {numbered[i]: own for i, own in state["state"].items()}, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, _plain(optimizer), optim_state_dict=state, options=options)


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)

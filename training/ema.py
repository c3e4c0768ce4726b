"""Exponential moving average of the trained weights (Sec. 3.3.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..modeling_mmar.saving_mmar import apply_umask


EMA_FILE = "ema.safetensors"
# Early steps average over fewer: decay (1 + t) / (10 + t), as in TensorFlow's moving averages.
EMA_WARMUP = 10


class EMA:
    """
    Exponential moving average of a model's trainable parameters, float32.

    Of parameters that are sharded over ranks (FSDP2) each rank averages its own shard.

    Args:
        model (`nn.Module`): Its trainable parameters are averaged.
        decay (`float`): Of the average, in [0, 1); less over the first steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.shadow = {
            name: local_part(p).detach().float().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (EMA_WARMUP + self.num_updates))
        parameters = dict(model.named_parameters())
        values = [local_part(parameters[name]).detach().float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), values, 1 - decay)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Goes over to the devices and shards of the model's parameters, should those have changed."""
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                value = self.shadow[name]
                if value.shape != local_part(parameter).shape:
                    value = _shard_like(value, parameter)
                self.shadow[name] = value.to(local_part(parameter).device)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model holds the averaged weights."""
        parameters = {name: local_part(p) for name, p in model.named_parameters() if name in self.shadow}
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        self._write(parameters, self.shadow)
        try:
            yield
        finally:
            self._write(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _write(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def save(self, folder: str | Path, model: nn.Module, should_save: bool = True) -> None:
        """Writes the whole average; every rank takes part where the model is sharded, and one writes."""
        whole = {}
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                value = _whole(self.shadow[name], parameter)
                if should_save:
                    whole[name] = value.cpu().contiguous()
        if should_save:
            save_file(
                {**whole, "num_updates": torch.tensor(self.num_updates)}, Path(folder) / EMA_FILE, {"format": "pt"}
            )
            apply_umask(folder)

    @torch.no_grad()
    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Raises ValueError if the file is missing or its parameters are not those of the average."""
        if not (Path(folder) / EMA_FILE).is_file():
            raise ValueError(f"expected {EMA_FILE} in the checkpoint; it is not there. Resume with `ema_decay=0`.")
        stored = load_file(Path(folder) / EMA_FILE)
        num_updates = int(stored.pop("num_updates"))
        parameters = {name: p for name, p in model.named_parameters() if name in self.shadow}
        shapes = {name: p.shape for name, p in parameters.items()}
        if {name: value.shape for name, value in stored.items()} != shapes:
            raise ValueError(
                f"{EMA_FILE} must hold the {len(shapes)} trained parameters; got {len(stored)}, or others. Resume "
                "with the same `train_backbone` and model."
            )
        self.num_updates = num_updates
        for name, parameter in parameters.items():
            self.shadow[name] = _shard_like(stored[name], parameter).to(local_part(parameter).device)


def local_part(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, where the parameter has shards."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    whole = whole.to(mesh.device_type)
    # Every rank holds the same, so that nothing needs to be sent.
    return distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None).to_local().clone()


def _whole(local: Tensor, parameter: Tensor) -> Tensor:
    """All of a tensor of which this rank has the shard that it has of the parameter."""
    if not isinstance(parameter, DTensor):
        return local
    sharded = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded.full_tensor()

"""
Autoencoders in CompVis' layout to folders of diffusers' models: what the commands for each kind have in common.

Sizes are read from the tensors, each of which is used exactly once.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.saving_mmar import sha256_of
from .folders import new_folder


# Where training code puts the weights, and their moving average, in what it saves.
WEIGHTS_ENTRIES = ("state_dict", "model_state_dict", "model")
EMA_ENTRIES = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
# CompVis' LitEma keeps averages beside the weights, under names without dots, and these two buffers.
EMA_PREFIX = "model_ema."
EMA_BUFFERS = ("decay", "num_updates")
# The discriminator and the perceptual loss.
LOSS_PREFIX = "loss"
# What only a VQ autoencoder has: its codebook.
QUANTIZER_PREFIX = "quantize."
FIRST_WEIGHT = "encoder.conv_in.weight"
# Lightning names these classes in its checkpoints as keys of a dict; nothing of them is needed.
LIGHTNING_CALLBACKS = tuple(
    f"{package}.callbacks.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "early_stopping.EarlyStopping",
        "lr_monitor.LearningRateMonitor",
    )
)

# diffusers' name -> CompVis' name, in this order; decoder levels are counted from the other end.
RENAMES = (
    (r"encoder\.down_blocks\.", "encoder.down."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
# Names in an error message.
MAX_NAMES = 8


@dataclass(frozen=True)
class AutoencoderKind:
    r"""
    A kind of autoencoder in CompVis' layout.

    Args:
        name (`str`): Its name in messages, such as `"KL"`.
        published (`str`): Files that hold one, for messages.
        model_class (`type[ModelMixin]`): Its class in diffusers.
        read_config (`Callable`): Weights under CompVis' names to the arguments of `model_class`.
        other_kinds (`Mapping[str, str]`, *optional*): What a file holds instead, and what to do with it, by the
            beginning of a name that tells.
    """

    name: str
    published: str
    model_class: type[ModelMixin]
    read_config: Callable[[dict[str, Tensor]], dict[str, Any]]
    other_kinds: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, got: str) -> str:
        """The message for a file that holds what `got` says."""
        return (
            f"expected a {self.name} autoencoder in CompVis' layout, with encoder.conv_in and decoder.conv_in; got "
            f"{got}"
        )

    def refusal_by_names(self, names: Iterable[Any]) -> str:
        """The message for a file that holds these names."""
        names = [str(name) for name in names]
        for beginning, got in self.other_kinds.items():
            if any(name.startswith(beginning) for name in names):
                return self.refusal(got)
        if any(".down_blocks." in name for name in names):
            return self.refusal("diffusers' layout. It needs no conversion: take its folder as it is.")
        return self.refusal(f"{listed(names)}. Take {self.published}.")


class _Unneeded:
    """Stands for a Lightning class whose name is all that a checkpoint holds."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    r"""
    Reads a checkpoint without running any code of it.

    Args:
        path (`str` or `Path`): `.safetensors`, or a file of `torch.save` such as `.ckpt` and `.pt`.

    Returns:
        `dict`: What was saved.

    Raises:
        ValueError: If there is no such file, it is broken, is no checkpoint, or holds more than data.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"expected whole safetensors in {shorten(str(path))}; got a broken or truncated file "
                f"({shorten(error)}). Download it again."
            ) from error
    allowed = torch.serialization.safe_globals([(_Unneeded, name) for name in LIGHTNING_CALLBACKS])
    try:
        with allowed:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported \w+:? ?[^.\n]*(\.\w+)*|GLOBAL [\w.]+", str(error))
        raise ValueError(
            f"expected only tensors and plain data in {shorten(str(path))}; it is broken or holds code, which was not "
            f"run ({reason[0] if reason else str(error).splitlines()[0]}). Download it again, or have its maker save "
            "the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected a checkpoint of torch in {shorten(str(path))}; it cannot be read ({error!r}). Download it "
            "again."
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(f"expected a dict of tensors in {shorten(str(path))}; got {type(saved).__name__}.")
    return saved


def autoencoder_weights(saved: dict[str, Any], kind: AutoencoderKind, use_ema: bool = True) -> dict[str, Tensor]:
    r"""
    Finds the autoencoder's weights in a checkpoint, under CompVis' names without a prefix.

    Args:
        saved (`dict`): As `read_checkpoint` gives it: a state dict, alone or as an entry, the autoencoder's own or
            that of a diffusion model with its `first_stage_model.`.
        kind (`AutoencoderKind`): What is expected.
        use_ema (`bool`, *optional*, defaults to `True`): Take the moving average of the weights where there is one.

    Returns:
        `dict[str, Tensor]`

    Raises:
        ValueError: If there is no autoencoder in CompVis' layout, or its moving average is not complete.
    """
    entries = [*(EMA_ENTRIES if use_ema else ()), *WEIGHTS_ENTRIES]
    state = next((saved[name] for name in entries if _is_state_dict(saved.get(name))), saved)
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    prefixes = sorted({name.removesuffix(FIRST_WEIGHT) for name in state if name.endswith(FIRST_WEIGHT)}, key=len)
    if not prefixes or any(".down_blocks." in name for name in state):
        raise ValueError(kind.refusal_by_names(state or saved))
    prefix = prefixes[0]
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    averages = {name.removeprefix(EMA_PREFIX): value for name, value in state.items() if name.startswith(EMA_PREFIX)}
    state = {name: value for name, value in state.items() if not name.startswith((EMA_PREFIX, f"{LOSS_PREFIX}."))}
    if use_ema and averages:
        averages = {
            name: value
            for name, value in averages.items()
            if name not in EMA_BUFFERS and not name.startswith(LOSS_PREFIX)
        }
        flat_names = {name.replace(".", ""): name for name in state}
        _check_same_names(flat_names, averages, "the moving average of the weights")
        state = {flat_names[name]: value for name, value in averages.items()}
    return state


def encoder_and_decoder_config(state: dict[str, Tensor]) -> dict[str, Any]:
    r"""
    Reads the sizes of an encoder and a decoder from their weights.

    Args:
        state (`dict[str, Tensor]`): Weights under CompVis' names.

    Returns:
        `dict`: Those arguments of diffusers' model that do not depend on what is between the two.

    Raises:
        ValueError: If a tensor is missing that tells a size.
    """
    levels = _indices(state, r"encoder\.down\.(\d+)\.")
    blocks = _indices(state, r"encoder\.down\.0\.block\.(\d+)\.")
    needed = [FIRST_WEIGHT, "encoder.conv_out.weight", "decoder.conv_out.weight"]
    needed += [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    check_present(state, needed)
    down_attention = set(_levels_with_attention(state, "encoder.down"))
    up_attention = set(_levels_with_attention(state, "decoder.up"))
    return {
        "in_channels": state[FIRST_WEIGHT].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "block_out_channels": [
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if level in down_attention else "DownEncoderBlock2D" for level in range(levels)
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if level in up_attention else "UpDecoderBlock2D"
            for level in reversed(range(levels))
        ],
        "layers_per_block": blocks,
        "norm_num_groups": 32,  # fixed in CompVis' code
        "sample_size": 256,  # all of LDM's and MAR's were trained at 256 x 256
    }


def convert_weights(state: dict[str, Tensor], config: dict[str, Any], model_class: type[ModelMixin]) -> ModelMixin:
    r"""
    Puts CompVis' weights into diffusers' model.

    Args:
        state (`dict[str, Tensor]`): Weights under CompVis' names.
        config (`dict`): Arguments of `model_class`.
        model_class (`type[ModelMixin]`): diffusers' class.

    Returns:
        `ModelMixin`: A `model_class` in float32.

    Raises:
        ValueError: If a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = model_class(**config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = {name: _compvis_name(name, len(config["block_out_channels"])) for name in shapes}
    _check_same_names(sources.values(), state, "the autoencoder")
    converted = {}
    for name, source in sources.items():
        tensor = state[source]
        if tensor.shape[2:] == (1, 1) and len(shapes[name]) == 2:
            tensor = tensor[:, :, 0, 0]  # attention's 1 x 1 convolutions are linears in diffusers
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"expected {source} of shape {tuple(shapes[name])}, as the other tensors have it; got "
                f"{tuple(state[source].shape)}. It is not an autoencoder of CompVis' layout."
            )
        converted[name] = tensor.float().contiguous()
    model.load_state_dict(converted, assign=True)
    return model.eval()


def convert_checkpoint(
    checkpoint: str | Path, out: str | Path, kind: AutoencoderKind, use_ema: bool = True, sha256: str | None = None
) -> dict[str, Any]:
    r"""
    Converts a checkpoint file to a folder of diffusers' model.

    Args:
        checkpoint (`str` or `Path`): File of an autoencoder, or of a diffusion model that holds one.
        out (`str` or `Path`): Folder to make.
        kind (`AutoencoderKind`): What is expected in the file.
        use_ema (`bool`, *optional*, defaults to `True`): Take the moving average of the weights where there is one.
        sha256 (`str`, *optional*): The file's expected hash, in hex.

    Returns:
        `dict`: `parameters`, `sha256` of the file, and `config`.

    Raises:
        ValueError: If the file is not what it should be, or `out` holds something; nothing is left in `out` then.
    """
    _check_file(checkpoint)
    digest = sha256_of(checkpoint)
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(
            f"expected the SHA-256 {sha256} of {shorten(str(checkpoint))}; got {digest}. Download the file again, or "
            "check where the hash is from."
        )
    state = autoencoder_weights(read_checkpoint(checkpoint), kind, use_ema)
    config = kind.read_config(state)
    model = convert_weights(state, config, kind.model_class)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with new_folder(out, num_bytes=torch.float32.itemsize * parameters) as folder:
        model.save_pretrained(folder)
    return {"parameters": parameters, "sha256": digest, "config": config}


def check_present(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raises a `ValueError` that names those of `names` that are not in `state`."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"expected the whole autoencoder in the checkpoint; {listed(missing)} missing. Download it again."
        )


def listed(names: Iterable[str]) -> str:
    """Names for an error message, not more than `MAX_NAMES`."""
    names = sorted(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more if names else "nothing"


def _check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        if Path(path).is_dir():
            raise ValueError(
                f"expected a checkpoint file; {shorten(str(path))} is a folder. Name the file; a folder of diffusers "
                "needs no conversion."
            )
        raise ValueError(f"expected a checkpoint file; there is none at {shorten(str(path))}. Check the path.")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())


def _indices(state: Iterable[str], pattern: str) -> int:
    """How many levels or blocks there are: one more than the largest index that `pattern` finds."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _levels_with_attention(state: Iterable[str], part: str) -> list[int]:
    pattern = re.escape(part) + r"\.(\d+)\.attn\."
    return [int(found[1]) for name in state if (found := re.match(pattern, name))]


def _compvis_name(name: str, num_levels: int) -> str:
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{num_levels - 1 - int(found[1])}", name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_same_names(expected: Iterable[str], got: Iterable[str], what: str) -> None:
    """Every key used exactly once."""
    expected, got = set(expected), set(got)
    if expected != got:
        missing, left_over = expected - got, got - expected
        raise ValueError(
            f"expected each tensor of {what} exactly once; missing: {listed(missing)}; left over: "
            f"{listed(left_over)}. The checkpoint is incomplete or of another architecture."
        )

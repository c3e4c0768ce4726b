"""
Converts a KL autoencoder in CompVis' layout, LDM's kl-f16 or MAR's KL-16, to a folder of diffusers' `AutoencoderKL`.

    mmar convert kl16 kl16.ckpt runs/kl16

The two differ in the decoder's first level, which has attention in LDM's and none in MAR's; the keys tell. Sizes are
read from the tensors, each of which is used exactly once. The latent scale is not in such files: measure it with
`mmar latent-scale`.
"""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from .compvis import (
    QUANTIZER_PREFIX,
    AutoencoderKind,
    convert_checkpoint,
    encoder_and_decoder_config,
)


def autoencoder_config(state: dict[str, Tensor]) -> dict[str, Any]:
    r"""
    Reads the sizes of a KL autoencoder from its weights.

    Args:
        state (`dict[str, Tensor]`): Weights under CompVis' names.

    Returns:
        `dict`: Arguments of `AutoencoderKL`, with `scaling_factor` 1: it has to be measured.

    Raises:
        ValueError: If a tensor is missing that tells a size, or the model is a VQ autoencoder.
    """
    if any(name.startswith(QUANTIZER_PREFIX) for name in state):
        raise ValueError(KL.refusal_by_names(state))
    config = encoder_and_decoder_config(state)
    has_quant_conv = "quant_conv.weight" in state
    moments = state["quant_conv.weight" if has_quant_conv else "encoder.conv_out.weight"].shape[0]
    return config | {
        "latent_channels": moments // 2,
        "use_quant_conv": has_quant_conv,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": 1.0,
    }


KL = AutoencoderKind(
    name="KL",
    published="LDM's kl-f16 or MAR's kl16.ckpt",
    model_class=AutoencoderKL,
    read_config=autoencoder_config,
    other_kinds={
        QUANTIZER_PREFIX: (
            "a VQ autoencoder (quantize.*). MMAR's tokens are continuous: take LDM's kl-f16. For the ablation with "
            "discrete tokens, `mmar convert vq16` converts it."
        ),
    },
)


def convert_kl16(checkpoint: str | Path, out: str | Path, use_ema: bool = True, sha256: str | None = None) -> dict:
    r"""
    Converts a checkpoint file to a folder of diffusers' `AutoencoderKL`.

    Args:
        checkpoint (`str` or `Path`): File of LDM's or MAR's autoencoder, or of an LDM that holds one.
        out (`str` or `Path`): Folder to make.
        use_ema (`bool`, *optional*, defaults to `True`): Take the moving average of the weights where there is one.
        sha256 (`str`, *optional*): The file's expected hash, in hex.

    Returns:
        `dict`: `variant`, `parameters`, `sha256` of the file, and `config`.

    Raises:
        ValueError: If the file is not what it should be, or `out` holds something; nothing is left in `out` then.
    """
    report = convert_checkpoint(checkpoint, out, KL, use_ema, sha256)
    has_attention = report["config"]["up_block_types"][0] == "AttnUpDecoderBlock2D"
    return {"variant": "LDM" if has_attention else "MAR"} | report

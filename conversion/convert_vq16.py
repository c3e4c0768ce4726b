"""
Converts a VQ autoencoder in CompVis' layout, LDM's vq-f16, to a folder of diffusers' `VQModel`.

    mmar convert vq16 vq-f16.ckpt runs/vq16

For the paper's ablation "w/ VQ" (suppl. Sec. 6.1), `MMARVQForConditionalGeneration`. Sizes are read from the tensors,
each of which is used exactly once. Other VQ autoencoders of LDM's convert too, if their codes are the nearest entries
of one codebook.
"""

from pathlib import Path
from typing import Any

from diffusers import VQModel
from torch import Tensor

from .compvis import (
    QUANTIZER_PREFIX,
    AutoencoderKind,
    check_present,
    convert_checkpoint,
    encoder_and_decoder_config,
    listed,
)


CODEBOOK = f"{QUANTIZER_PREFIX}embedding.weight"


def autoencoder_config(state: dict[str, Tensor]) -> dict[str, Any]:
    r"""
    Reads the sizes of a VQ autoencoder from its weights.

    Args:
        state (`dict[str, Tensor]`): Weights under CompVis' names.

    Returns:
        `dict`: Arguments of `VQModel`.

    Raises:
        ValueError: If a tensor is missing that tells a size, the model is a KL autoencoder, or its quantizer is not a
            codebook.
    """
    config = encoder_and_decoder_config(state)
    check_present(state, ["decoder.conv_in.weight"])
    encoded, decoded = state["encoder.conv_out.weight"].shape[0], state["decoder.conv_in.weight"].shape[1]
    quantizer = [name for name in state if name.startswith(QUANTIZER_PREFIX)]
    if not quantizer and encoded == 2 * decoded:
        # A mean and a log-variance for each channel that the decoder reads.
        raise ValueError(VQ.refusal("a KL autoencoder. `mmar convert kl16` converts it."))
    if quantizer and CODEBOOK not in quantizer:
        raise ValueError(VQ.refusal(f"a quantizer without {CODEBOOK} ({listed(quantizer)}). Take {VQ.published}."))
    check_present(state, [CODEBOOK, "quant_conv.weight"])
    return config | {
        "latent_channels": encoded,
        "vq_embed_dim": state["quant_conv.weight"].shape[0],
        "num_vq_embeddings": state[CODEBOOK].shape[0],
    }


VQ = AutoencoderKind(
    name="VQ",
    published="LDM's vq-f16",
    model_class=VQModel,
    read_config=autoencoder_config,
)


def convert_vq16(checkpoint: str | Path, out: str | Path, use_ema: bool = True, sha256: str | None = None) -> dict:
    r"""
    Converts a checkpoint file to a folder of diffusers' `VQModel`.

    Args:
        checkpoint (`str` or `Path`): File of LDM's VQ autoencoder, or of an LDM that holds one.
        out (`str` or `Path`): Folder to make.
        use_ema (`bool`, *optional*, defaults to `True`): Take the moving average of the weights where there is one.
        sha256 (`str`, *optional*): The file's expected hash, in hex.

    Returns:
        `dict`: `parameters`, `sha256` of the file, and `config`.

    Raises:
        ValueError: If the file is not what it should be, or `out` holds something; nothing is left in `out` then.
    """
    return convert_checkpoint(checkpoint, out, VQ, use_ema, sha256)

"""
Quantized backbones: Qwen2's linears in 8 or 4 bits, with torchao or bitsandbytes. Trained weights keep their dtype.

torchao changes weights and leaves modules as they are. bitsandbytes replaces modules, and only exact `nn.Linear`; so
its quantizers are told here of `PLoRALinear`, for the time that an MMAR is loaded.
"""

import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_mmar import TRAINED_SUFFIXES, shorten
from .plora_mmar import PLoRALinear


# Parts that a quantization leaves alone, beside PLoRA's own weights.
NOT_QUANTIZED = ("lm_head", "model.latent_encoder", "diffusion_mlp", "vae")
# Method -> where its settings name the modules to leave alone.
SKIPPED_MODULES = {"torchao": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules"}


def for_backbone_only(quantization_config: Any) -> QuantizationConfigMixin:
    r"""
    The settings of a quantization, for Qwen2's linears alone.

    Args:
        quantization_config (`TorchAoConfig`, `BitsAndBytesConfig` or their `dict`): As for `from_pretrained`.

    Returns:
        A copy that names what to leave alone: what is trained, `lm_head` and the VAE.

    Raises:
        ValueError: If it is of another method or type.
    """
    if isinstance(quantization_config, dict):
        try:
            quantization_config = quantizers.AutoQuantizationConfig.from_dict(quantization_config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "`quantization_config` must be a `TorchAoConfig` or a `BitsAndBytesConfig`; got "
                f"{shorten(quantization_config)} ({shorten(error)})."
            ) from error
        except ImportError as error:
            raise ImportError(
                f"`quantization_config` {shorten(quantization_config)} needs a package that is not installed "
                f"({shorten(error)}); `pip install torchao`."
            ) from error
    method = getattr(quantization_config, "quant_method", None)
    method = str(getattr(method, "value", method))
    if method not in SKIPPED_MODULES or not isinstance(quantization_config, QuantizationConfigMixin):
        raise ValueError(
            "`quantization_config` must be a `TorchAoConfig` or a `BitsAndBytesConfig`; got "
            f"{shorten(quantization_config)}. Other methods would replace or pass over PLoRA's linears."
        )
    quantization_config = copy.deepcopy(quantization_config)
    name = SKIPPED_MODULES[method]
    skipped = sorted({*(getattr(quantization_config, name) or []), *NOT_QUANTIZED})
    setattr(quantization_config, name, skipped)
    return quantization_config


@contextlib.contextmanager
def plora_aware_quantizers() -> Iterator[None]:
    """Within the context transformers quantizes `PLoRALinear` with bitsandbytes as it does `nn.Linear`."""
    names = ("bitsandbytes_4bit", "bitsandbytes_8bit")
    kept = {name: quantizers.AUTO_QUANTIZER_MAPPING[name] for name in names}
    quantizers.AUTO_QUANTIZER_MAPPING.update(zip(names, (_Bnb4bit, _Bnb8bit), strict=True))
    try:
        yield
    finally:
        quantizers.AUTO_QUANTIZER_MAPPING.update(kept)


class _WithPLoRA(HfQuantizer):
    """A quantizer of bitsandbytes that replaces PLoRA's base linears and lets their branches be."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        return not param_name.endswith(TRAINED_SUFFIXES) and super().param_needs_quantization(model, param_name)

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs) -> None:
        layers = {name: module for name, module in model.named_modules() if type(module) is PLoRALinear}
        if not layers:  # another model, loaded beside an MMAR
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            return
        skipped = list(self.quantization_config.llm_int8_skip_modules or [])
        if self.quantization_config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
            skipped += [name for name, device in device_map.items() if device in ("disk", "cpu")]
        self.modules_to_not_convert = skipped
        for name, linear in layers.items():
            if should_convert_module(name, skipped):
                model.set_submodule(name, self._quantized(linear))

    def _dequantize(self, model: nn.Module, *args, **kwargs) -> nn.Module:
        if any(isinstance(module, PLoRALinear) for module in model.modules()):
            raise ValueError(
                "a quantized MMAR cannot be dequantized, its PLoRA would be lost; load it without "
                "`quantization_config`."
            )
        return super()._dequantize(model, *args, **kwargs)

    def _quantized(self, linear: PLoRALinear) -> PLoRALinear:
        kind, settings = self._kind_and_settings()
        rank = linear.image_A.shape[0]
        with torch.device("meta"):
            quantized = kind(
                linear.in_features,
                linear.out_features,
                rank,
                linear.image_scaling * rank,
                bias=linear.bias is not None,
                **settings,
            )
        # bitsandbytes packs weights for inference on a CPU, and then takes no gradient and not every width.
        quantized.support_avx512bf16_for_cpu = False
        quantized.source_cls = nn.Linear  # read by transformers, which transposes other kinds
        # All but the weight as they are, and in their dtype.
        quantized._parameters.update({name: own for name, own in linear._parameters.items() if name != "weight"})
        if self.pre_quantized:
            quantized.weight.data = quantized.weight.data.to(self._stored_dtype())
        quantized.weight.requires_grad_(False)
        return quantized


class _Bnb4bit(_WithPLoRA, Bnb4BitHfQuantizer):
    def _kind_and_settings(self) -> tuple[type[PLoRALinear], dict[str, Any]]:
        config = self.quantization_config
        return _plora_linear("Linear4bit"), {
            "compute_dtype": config.bnb_4bit_compute_dtype,
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_type": config.bnb_4bit_quant_type,
            "quant_storage": config.bnb_4bit_quant_storage,
        }

    def _stored_dtype(self) -> torch.dtype:
        return self.quantization_config.bnb_4bit_quant_storage


class _Bnb8bit(_WithPLoRA, Bnb8BitHfQuantizer):
    def _kind_and_settings(self) -> tuple[type[PLoRALinear], dict[str, Any]]:
        config = self.quantization_config
        return _plora_linear("Linear8bitLt"), {
            "has_fp16_weights": config.llm_int8_has_fp16_weight,
            "threshold": config.llm_int8_threshold,
        }

    def _stored_dtype(self) -> torch.dtype:
        return torch.int8


@functools.cache
def _plora_linear(name: str) -> type[PLoRALinear]:
    """`PLoRALinear` whose base is a linear of bitsandbytes: `Linear4bit` or `Linear8bitLt`."""
    base = getattr(importlib.import_module("bitsandbytes.nn"), name)
    return type(f"PLoRA{name}", (PLoRALinear, base), {"__doc__": PLoRALinear.__doc__})

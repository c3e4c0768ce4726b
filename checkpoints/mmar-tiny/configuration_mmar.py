"""MMAR configuration. Defaults are MMAR-0.5B (arXiv 2410.10798, suppl. Table 5)."""

import math
import reprlib
import warnings
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


# Longest value, and most names of a list, in an error message.
MAX_SHOWN_LENGTH = 200
# Longest text of another exception in one.
MAX_ERROR_LENGTH = 500
MAX_SHOWN_NAMES = 30

# LDM's KL-16 in diffusers' terms: a 256 x 256 picture becomes 16 x 16 tokens of 16 channels (suppl. Sec. 6.1).
KL16_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 256,
    # Not measured yet: `scaling_factor` = 1 / std of the latents of the data at hand.
    "scaling_factor": 1.0,
}

# Qwen2-0.5B-Instruct (suppl. Sec. 6.1), the fields that differ from Qwen2Config's defaults.
QWEN2_0_5B_CONFIG = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}

# The paper's protocol: one token per step, 100 DDPM steps each (Sec. 4.6), guidance 10 (suppl. Sec. 6.5).
PAPER_IMAGE_GENERATION = {"num_ar_steps": 256, "num_inference_steps": 100, "guidance_scale": 10.0}

# What a stored config must hold, and the entries of it: the defaults of another model would give another image.
NEEDED_ENTRIES = {
    "image_generation": set(PAPER_IMAGE_GENERATION),
    "diffusion_config": {"prediction_type", "num_train_timesteps"},
    "vae_config": {"block_out_channels", "latent_channels"},
    "plora_alpha": set(),
}

FROZEN_PARTS = ("backbone", "vae")
# Trained, though inside the backbone: PLoRA's factors.
TRAINED_SUFFIXES = (".image_A", ".image_B")
# How a folder holds the weights of the frozen parts, and what earlier versions called it.
FROZEN_WEIGHTS = ("include", "reference")
OLD_FROZEN_WEIGHTS = {"included": "include", "referenced": "reference"}
PREDICTION_TYPES = ("v_prediction", "epsilon")
# Labels of tokens that carry no text loss; the index that torch's cross entropy ignores.
IGNORE_INDEX = -100

# Where transformers finds MMAR's code in a folder or repository.
AUTO_MAP = {
    "AutoConfig": "configuration_mmar.MMARConfig",
    "AutoModel": "modeling_mmar.MMARForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mmar.MMARForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mmar.MMARForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "text-to-image": {
        "impl": "text_to_image_mmar.MMARTextToImagePipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


def _check_floats(config: PreTrainedConfig) -> None:
    for name in ("mlp_ratio", "layer_norm_eps", "initializer_range"):
        if not 0 < (value := getattr(config, name, 1.0)) < math.inf:
            raise ValueError(f"`{name}` of `{config.base_config_key}` must be above 0 and finite; got {value!r}.")


@strict
class MMARViTConfig(PreTrainedConfig):
    r"""
    EmbeddingViT: a ViT encoder over the known image tokens (Sec. 3.3.2; suppl. Table 5).

    Args:
        hidden_size (`int`, *optional*, defaults to 1024): Width d_ViT.
        num_hidden_layers (`int`, *optional*, defaults to 16): Number of layers N_ViT.
        num_attention_heads (`int`, *optional*, defaults to 16): Attention heads; ours, as ViT-L.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Width of the MLP in units of `hidden_size`; ours, as ViT.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02): Std of the positions and the mask token; linears
            start with Xavier's weights, as MAR's.
    """

    model_type = "mmar_vit"
    base_config_key = "vit_config"

    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def validate_architecture(self):
        super().validate_architecture()
        _check_floats(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) of `vit_config` must be a multiple of its "
                f"`num_attention_heads` ({self.num_attention_heads}); change one of them."
            )


@strict
class MMARDiffusionConfig(PreTrainedConfig):
    r"""
    Diffusion MLP and its noise schedule (Sec. 3.3.2; suppl. Table 5).

    Args:
        hidden_size (`int`, *optional*, defaults to 1024): Width d_mlp.
        num_hidden_layers (`int`, *optional*, defaults to 8): Number of residual blocks N_diff.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Expansion r_mlp of the two-layer MLP.
        frequency_embedding_size (`int`, *optional*, defaults to 256): Sinusoidal channels of the timestep; MAR.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): Epsilon of the layer norms.
        prediction_type (`str`, *optional*, defaults to `"v_prediction"`): `"v_prediction"` (Eq. 7) or `"epsilon"`.
        num_train_timesteps (`int`, *optional*, defaults to 1000): T; MAR.
        beta_schedule (`str`, *optional*, defaults to `"squaredcos_cap_v2"`): The cosine schedule; MAR.
        diffusion_batch_mul (`int`, *optional*, defaults to 4): Timesteps drawn per `z` in training; MAR.
    """

    model_type = "mmar_diffusion"
    base_config_key = "diffusion_config"

    hidden_size: int = 1024
    num_hidden_layers: int = 8
    mlp_ratio: float = 4.0
    frequency_embedding_size: int = 256
    layer_norm_eps: float = 1e-6
    prediction_type: str = "v_prediction"
    num_train_timesteps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    diffusion_batch_mul: int = 4

    def validate_architecture(self):
        super().validate_architecture()
        _check_floats(self)
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}; got {shorten(self.prediction_type)}."
            )
        if self.beta_schedule != "squaredcos_cap_v2":
            raise ValueError(f"`beta_schedule` must be 'squaredcos_cap_v2'; got {shorten(self.beta_schedule)}.")
        for name in ("num_train_timesteps", "diffusion_batch_mul"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")


@strict
class MMARConfig(PreTrainedConfig):
    r"""
    Configuration of an MMAR model.

    Args:
        text_config (`dict` or `Qwen2Config`, *optional*): The language model; defaults to Qwen2-0.5B-Instruct.
        vit_config (`dict` or `MMARViTConfig`, *optional*): EmbeddingViT.
        diffusion_config (`dict` or `MMARDiffusionConfig`, *optional*): Diffusion MLP.
        vae_config (`dict`, *optional*): Arguments of diffusers' `AutoencoderKL`; defaults to KL-16. The latent scale
            lives here and nowhere else: `scaling_factor` and `shift_factor`, or per channel `latents_mean` and
            `latents_std`.
        image_size (`int`, *optional*, defaults to 256): Height and width of the pictures in pixels.
        plora_rank (`int`, *optional*, defaults to 512): Rank r of PLoRA (suppl. Table 5).
        plora_alpha (`float`, *optional*, defaults to 128.0): PLoRA's output is scaled by alpha / r (suppl. Table 5).
        image_token_id (`int`, *optional*, defaults to 151646): Placeholder of one image token; by default the
            first row of Qwen2's embedding that its tokenizer leaves unused. Its embedding is never read.
        image_generation (`dict`, *optional*): Defaults of image generation, `num_ar_steps`, `num_inference_steps` and
            `guidance_scale`; the paper's protocol when not given (Sec. 4.6).
        null_prompt_ids (`list[int]`, *optional*): Tokens of the null prompt, for guidance where no processor is at
            hand, as in `generate(generation_mode="image")`. `MMARPipeline` fills them in.
        frozen_parts (`dict`, *optional*): Where the frozen parts come from: `"backbone"` and `"vae"`, each with
            `repo_id` and, for a repository, the commit as `revision`, for a local folder `sha256` of its files.
        frozen_weights (`str`, *optional*, defaults to `"include"`): Whether the folder holds the weights of these
            parts, or only the `"reference"` to them.
        tie_word_embeddings (`bool`, *optional*): Copied from `text_config`; no need to set it.

    Example:

    ```python
    >>> from mmar import MMARConfig

    >>> config = MMARConfig()
    >>> config.num_latents, config.latent_channels
    (256, 16)
    ```
    """

    model_type = "mmar"
    # Of an evaluation or prediction of transformers' `Trainer`, logits are left: what `compute_metrics` is given.
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    keys_to_ignore_at_inference += ["text_loss", "image_loss", "token_losses", "timesteps"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2", init_kwargs=QWEN2_0_5B_CONFIG),
        "vit_config": MMARViTConfig,
        "diffusion_config": MMARDiffusionConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vit_config: dict | PreTrainedConfig | None = None
    diffusion_config: dict | PreTrainedConfig | None = None
    vae_config: dict[str, Any] | None = None
    image_size: int = 256
    plora_rank: int = 512
    plora_alpha: float = 128.0
    image_token_id: int = 151646
    image_generation: dict[str, Any] | None = None
    null_prompt_ids: list[int] | None = None
    frozen_parts: dict[str, Any] | None = None
    frozen_weights: str = "include"
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vae_config = dict(KL16_CONFIG if self.vae_config is None else self.vae_config)
        self.image_generation = PAPER_IMAGE_GENERATION | (self.image_generation or {})
        if not __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            # Installed, the registered pipeline serves; this entry would have transformers ask for trust.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        # The backbone decides: transformers ties weights by the outer config.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        r"""
        A configuration from a dictionary, such as a config.json holds; see `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: If an entry is missing without which the model would generate another image in silence.
        """
        for name, needed in NEEDED_ENTRIES.items():
            if name in kwargs:
                continue
            value = config_dict.get(name)
            value = value.to_dict() if isinstance(value, PreTrainedConfig) else value
            if value is None or (needed and not (isinstance(value, dict) and needed <= value.keys())):
                entries = f", with {', '.join(sorted(needed))}," if needed else ""
                raise ValueError(
                    f"`{name}` must stand in a stored config{entries} whose image would be another without; got "
                    f"{shorten(value)}. Copy config.json again, or complete it."
                )
        if (old := config_dict.get("frozen_weights")) in OLD_FROZEN_WEIGHTS:
            config_dict = {**config_dict, "frozen_weights": OLD_FROZEN_WEIGHTS[old]}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, with the entries by which transformers finds MMAR's code."""
        output = super().to_dict()
        for name in self.sub_configs:
            # Loading gives the parts our dtype: saved before or after it, the file is the same.
            if isinstance(output.get(name), dict) and output[name].get("dtype") is None and output.get("dtype"):
                output[name]["dtype"] = output["dtype"]
        return {**output, "auto_map": dict(AUTO_MAP), "custom_pipelines": deepcopy(CUSTOM_PIPELINES)}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each axis."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def latent_size(self) -> int:
        """Height and width h = w of the latents."""
        return self.image_size // self.vae_scale_factor

    @property
    def num_latents(self) -> int:
        """N: image tokens per picture."""
        return self.latent_size**2

    @property
    def latent_channels(self) -> int:
        """C: channels of one image token."""
        return self.vae_config["latent_channels"]

    @property
    def image_parts(self) -> dict[str, str]:
        """What reads and what draws image tokens, as a model card tells it."""
        vit, diffusion = self.vit_config, self.diffusion_config
        return {
            "EmbeddingViT": f"{vit.num_hidden_layers} layers of width {vit.hidden_size}",
            "diffusion MLP": f"{diffusion.num_hidden_layers} blocks of width {diffusion.hidden_size}, "
            f"{diffusion.prediction_type}",
        }

    def validate_architecture(self):
        super().validate_architecture()
        if self.text_config.model_type != "qwen2":
            raise ValueError(
                f"`text_config` must be a 'qwen2' config; got {shorten(self.text_config.model_type)}. MMAR's PLoRA "
                "layers are built on Qwen2."
            )
        if self.text_config.use_sliding_window:
            raise ValueError(
                "`text_config.use_sliding_window` must be False: an image is one bidirectional block and does not fit "
                "a sliding window; got True."
            )
        if missing := [key for key in ("block_out_channels", "latent_channels") if key not in self.vae_config]:
            raise ValueError(
                f"`vae_config` must be the whole config of an AutoencoderKL; {', '.join(missing)} missing. Take "
                "`dict(vae.config)` of the trained VAE."
            )
        _check_latent_scale(self.vae_config)
        if self.image_size < 1 or self.image_size % self.vae_scale_factor:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of {self.vae_scale_factor}, the downsampling of "
                "`vae_config`; change one of them."
            )
        if unknown := self.image_generation.keys() - PAPER_IMAGE_GENERATION.keys():
            raise ValueError(
                f"`image_generation` may hold {', '.join(PAPER_IMAGE_GENERATION)}; got "
                f"{shorten_names(sorted(unknown))}."
            )
        for name in ("num_ar_steps", "num_inference_steps"):
            value = self.image_generation[name]
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"`image_generation[{shorten(name)}]` must be an integer of at least 1; got {shorten(value)}."
                )
        scale = self.image_generation["guidance_scale"]
        if type(scale) not in (int, float) or not 0 <= scale < math.inf:
            raise ValueError(
                f"`image_generation['guidance_scale']` must be a finite number of at least 0; got {shorten(scale)}."
            )
        for part, reference in (self.frozen_parts or {}).items():
            _check_reference(part, reference)
        self.frozen_weights = current_frozen_weights(self.frozen_weights, "`frozen_weights`")
        if self.frozen_weights == "reference" and not self.frozen_parts:
            raise ValueError("`frozen_parts` must name the parts where `frozen_weights` is 'reference'; got none.")
        if self.plora_rank < 1:
            raise ValueError(f"`plora_rank` must be at least 1; got {self.plora_rank}.")
        if not 0 < self.plora_alpha < math.inf:
            raise ValueError(f"`plora_alpha` must be above 0 and finite; got {self.plora_alpha!r}.")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` ({self.image_token_id}) must lie inside `text_config.vocab_size` "
                f"({self.text_config.vocab_size}), so that no embedding row has to be added."
            )


def _check_latent_scale(vae_config: dict[str, Any]) -> None:
    """Raises a `ValueError` if shift and scale of the latents are incomplete, or no numbers."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    scale, shift = vae_config.get("scaling_factor", 1.0), vae_config.get("shift_factor")
    if not is_number(scale) or scale <= 0:
        raise ValueError(f"`vae_config['scaling_factor']` must be above 0 and finite; got {shorten(scale)}.")
    if shift is not None and not is_number(shift):
        raise ValueError(f"`vae_config['shift_factor']` must be finite, or None; got {shorten(shift)}.")
    given = {name: vae_config.get(name) for name in ("latents_mean", "latents_std")}
    if all(values is None for values in given.values()):
        return
    num_channels = vae_config.get("latent_channels")
    for name, values in given.items():
        numbers = isinstance(values, (list, tuple)) and all(map(is_number, values))
        if not numbers or len(values) != num_channels or (name == "latents_std" and min(values) <= 0):
            kind = "finite numbers above 0" if name == "latents_std" else "finite numbers"
            raise ValueError(
                f"`vae_config[{name!r}]` must be {num_channels} {kind}, one per channel, where latents are scaled by "
                f"channel; got {shorten(values)}. Measure the scale again, or copy the VAE's config."
            )


def current_frozen_weights(value: Any, name: str) -> str:
    """One of `FROZEN_WEIGHTS`; earlier names warn, and a `ValueError` says what else `name` is."""
    if isinstance(value, str) and value in OLD_FROZEN_WEIGHTS:
        new = OLD_FROZEN_WEIGHTS[value]
        warnings.warn(f"{name} {value!r} is now called {new!r}; the old name goes.", FutureWarning, stacklevel=3)
        return new
    if not isinstance(value, str) or value not in FROZEN_WEIGHTS:
        raise ValueError(f"{name} must be {' or '.join(map(repr, FROZEN_WEIGHTS))}; got {shorten(value)}.")
    return value


def shorten(value: Any, max_length: int | None = None) -> str:
    r"""
    A value as an error message shows it, however long or deeply nested it is.

    Args:
        value: Anything. The text of an exception is shown as it is, other values by their `repr`.
        max_length (`int`, *optional*): Of the result, in characters; 200 by default, 500 for an exception.

    Returns:
        `str`: One line; without its middle if it would be longer.
    """
    is_error = isinstance(value, BaseException)
    max_length = max_length or (MAX_ERROR_LENGTH if is_error else MAX_SHOWN_LENGTH)
    if is_error:
        # Of a text of megabytes only the ends are looked at.
        text = str(value)
        text = " ".join(
            (text if len(text) <= 4 * max_length else f"{text[:max_length]}...{text[-max_length:]}").split()
        )
        text = text or type(value).__name__
    else:
        text = _SHORT_REPR.repr(value)
    half = (max_length - 3) // 2
    return text if len(text) <= max_length else f"{text[:half]}...{text[-half:]}"


def shorten_names(names: Iterable[Any]) -> str:
    """Names as an error message lists them, each shortened, without those after the first `MAX_SHOWN_NAMES`."""
    names = [str(name) for name in names]
    shown = [name if len(name) <= MAX_SHOWN_LENGTH // 4 else shorten(name, MAX_SHOWN_LENGTH // 4) for name in names]
    more = [f"and {len(names) - MAX_SHOWN_NAMES} more"] if len(names) > MAX_SHOWN_NAMES else []
    return ", ".join(shown[:MAX_SHOWN_NAMES] + more)


class _ShortRepr(reprlib.Repr):
    """`repr` that looks at no more of a value than is shown."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset, self.maxdict = (
            4,
            10,
            10,
            10,
            10,
            10,
        )
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN_LENGTH

    def repr_dict(self, value: dict, level: int) -> str:
        # In the dictionary's own order, where reprlib sorts.
        if not value or level <= 0:
            return "{...}" if value else "{}"
        entries = [f"{self.repr1(key, level - 1)}: {self.repr1(value[key], level - 1)}" for key in self._first(value)]
        return "{" + ", ".join(entries + ["..."] * (len(value) > self.maxdict)) + "}"

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write longer ones.
        return repr(value) if value.bit_length() < 4 * self.maxlong else f"an integer of {value.bit_length()} bits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value) if len(value) <= self.maxstring else f"{len(value)} bytes"

    def _first(self, value: dict) -> list[Any]:
        return [key for key, _ in zip(value, range(self.maxdict), strict=False)]


_SHORT_REPR = _ShortRepr()


def _check_reference(part: str, reference: Any) -> None:
    if part not in FROZEN_PARTS:
        raise ValueError(f"`frozen_parts` may hold {', '.join(FROZEN_PARTS)}; got {shorten(part)}.")
    hashes = reference.get("sha256") if isinstance(reference, dict) else None
    if isinstance(hashes, dict) and not all(isinstance(text, str) for entry in hashes.items() for text in entry):
        raise ValueError(
            f"`frozen_parts[{shorten(part)}]['sha256']` must be hashes by file name; got {shorten(hashes)}."
        )
    kinds = {"repo_id": str, "revision": str | None, "sha256": dict | None}
    if (
        not isinstance(reference, dict)
        or not reference.get("repo_id")
        or reference.keys() - kinds.keys()
        or not all(isinstance(value, kinds[name]) for name, value in reference.items())
    ):
        raise ValueError(
            f"`frozen_parts[{shorten(part)}]` must be a dict with `repo_id`, and `revision` or `sha256` where they "
            f"are known; got {shorten(reference)}."
        )

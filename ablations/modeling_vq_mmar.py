"""
MMAR with a vector-quantized image tokenizer, the paper's ablation "w/ VQ" (suppl. Sec. 6.1): what quantization costs.

Image tokens are entries of the codebook of a frozen VQ-16, read as MMAR reads its latents. Where z is, a linear maps
it to the codebook, and the loss is the cross entropy of the codes.
"""

from typing import Any

import torch
from diffusers import VQModel
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_mmar.checks_mmar import check_latents, check_pixel_values
from ..modeling_mmar.configuration_mmar import KL16_CONFIG, MMARConfig, shorten
from ..modeling_mmar.modeling_mmar import KeepsDtype, MMARForConditionalGeneration


# LDM's vq-f16 in diffusers' terms: KL-16's network, 16,384 codes of 8 channels, 16 x 16 for a 256 x 256 picture.
VQ16_CONFIG = {
    **{name: value for name, value in KL16_CONFIG.items() if name != "scaling_factor"},
    "latent_channels": 8,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 16384,
}
AUTO_MAP = {
    "AutoConfig": "modeling_vq_mmar.MMARVQConfig",
    "AutoModel": "modeling_vq_mmar.MMARVQForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vq_mmar.MMARVQForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vq_mmar.MMARVQForConditionalGeneration",
}


@strict
class MMARVQConfig(MMARConfig):
    r"""
    Configuration of `MMARVQForConditionalGeneration`: that of MMAR, with another image tokenizer.

    `vae_config` holds the arguments of diffusers' `VQModel`, LDM's vq-f16 by default; `diffusion_config` is not used.
    """

    model_type = "mmar_vq"

    def __post_init__(self, **kwargs):
        self.vae_config = dict(VQ16_CONFIG if self.vae_config is None else self.vae_config)
        # As diffusers has it.
        if self.vae_config.get("vq_embed_dim") is None:
            self.vae_config["vq_embed_dim"] = self.vae_config.get("latent_channels")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    @property
    def latent_channels(self) -> int:
        """C: channels of a code."""
        return self.vae_config["vq_embed_dim"]

    @property
    def num_codes(self) -> int:
        """K: entries of the codebook."""
        return self.vae_config["num_vq_embeddings"]

    @property
    def image_parts(self) -> dict[str, str]:
        """What reads and what draws image tokens; see `MMARConfig`."""
        return {
            "EmbeddingViT": super().image_parts["EmbeddingViT"],
            "image head": f"a linear to {self.num_codes:,} codes, cross entropy",
        }

    def validate_architecture(self):
        super().validate_architecture()
        if missing := [key for key in ("vq_embed_dim", "num_vq_embeddings") if not self.vae_config.get(key)]:
            raise ValueError(
                f"`vae_config` must be the whole config of a VQModel; {', '.join(missing)} missing. Take "
                "`dict(vq.config)` of the trained tokenizer."
            )
        # Of a single code there is no variance to scale to one.
        for name, least in (("vq_embed_dim", 1), ("num_vq_embeddings", 2)):
            value = self.vae_config[name]
            if type(value) is not int or value < least:
                raise ValueError(
                    f"`vae_config[{shorten(name)}]` must be an integer of at least {least}; got {shorten(value)}."
                )


class MMARVQModel(KeepsDtype, VQModel):
    """diffusers' `VQModel` in float32."""

    def to_json_string(self) -> str:
        # What is saved is opened by diffusers, which has no class of this name.
        return super().to_json_string().replace(f'"{type(self).__name__}"', f'"{VQModel.__name__}"')


class CodeSampler:
    r"""
    Draws codes from z, in place of a denoiser.

    Args:
        code_head (`nn.Linear`): z to logits over the codebook.
        codebook (`torch.FloatTensor` of shape `(K, C)`): Its entries.
    """

    num_steps = 1

    def __init__(self, code_head: nn.Linear, codebook: Tensor):
        self._code_head, self._codebook = code_head, codebook

    def __call__(self, z: Tensor, guidance_scales: list[float] | None, generators: list[torch.Generator]) -> Tensor:
        r"""
        Args:
            z (`torch.FloatTensor` of shape `(M, D)`, or `(2 M, D)` with guidance): Conditions, the unconditional ones
                last.
            guidance_scales (`list[float]` of length 1, *optional*): w of logits l_u + w (l_c - l_u).
            generators (`list[torch.Generator]`): One per picture, each for M / len(generators) of the tokens.

        Returns:
            `torch.FloatTensor` of shape `(M, C)`: entries of the codebook.
        """
        logits = self._code_head(z.to(self._code_head.weight.dtype)).float()
        if guidance_scales is not None:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, guidance_scales[0])
        codes = [
            torch.multinomial(own.to(generator.device), 1, generator=generator)[:, 0].to(z.device)
            for own, generator in zip(logits.softmax(-1).chunk(len(generators)), generators, strict=True)
        ]
        return self._codebook[torch.cat(codes)]


class MMARVQForConditionalGeneration(MMARForConditionalGeneration):
    r"""
    MMAR on discrete image tokens; everything else is `MMARForConditionalGeneration`'s.

    `latents` `(B, C, h, w)` are entries of the codebook, shifted and scaled to unit variance per channel. A code is
    drawn at once: of `num_inference_steps` and `scheduler` `generate_images` makes no use.

    Example:

    ```python
    >>> from mmar.ablations.modeling_vq_mmar import MMARVQConfig

    >>> config = MMARVQConfig()
    >>> config.num_latents, config.num_codes
    (256, 16384)
    ```
    """

    config_class = MMARVQConfig
    vae_class = MMARVQModel
    needed_vae_entries = ()
    remote_modules = ("modeling_vq_mmar",)

    def add_image_head(self) -> None:
        self.code_head = nn.Linear(self.config.text_config.hidden_size, self.config.num_codes)

    @property
    def image_head(self) -> nn.Module:
        return self.code_head

    @property
    def codebook(self) -> Tensor:
        """The tokenizer's entries `(K, C)`, float32, of mean 0 and variance 1 in each channel."""
        entries = self.vae.quantize.embedding.weight.detach().float()
        return (entries - entries.mean(0)) / entries.std(0)

    def codes_of(self, latent_tokens: Tensor) -> Tensor:
        """Numbers `(...)` of the nearest entries of tokens `(..., C)`, int64."""
        flat = latent_tokens.float().flatten(0, -2)
        return torch.cdist(flat, self.codebook).argmin(-1).view(latent_tokens.shape[:-1])

    @torch.no_grad()
    def encode_image_distributions(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures to their codes' entries and to a std of 0; see `MMARForConditionalGeneration`."""
        check_pixel_values(pixel_values, self.config)
        with torch.autocast(pixel_values.device.type, enabled=False):
            encoded = self.vae.encode(pixel_values.to(self.vae.dtype)).latents
            codes = self.vae.quantize(encoded)[2][2]
        size = self.config.latent_size
        # (I * h * w, C) -> (I, C, h, w)
        latents = self.codebook[codes].view(len(pixel_values), size, size, -1).permute(0, 3, 1, 2).contiguous()
        return latents, torch.zeros_like(latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents to pictures, by their nearest codes; see `MMARForConditionalGeneration`."""
        check_latents(latents, None, self.config)
        codes = self.codes_of(latents.permute(0, 2, 3, 1))
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            entries = self.vae.quantize.embedding(codes).permute(0, 3, 1, 2)
            return self.vae.decode(entries, force_not_quantize=True).sample.float()

    def image_token_loss(
        self,
        latent_tokens: Tensor,
        z: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_tokens: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross entropies of the M tokens' codes, `(1, M)`, in nats, and timesteps that are all 0."""
        logits = self.code_head(z.to(self.code_head.weight.dtype)).float()
        losses = F.cross_entropy(logits, self.codes_of(latent_tokens), reduction="none")[None]
        return losses, torch.zeros_like(losses, dtype=torch.long)

    def token_samplers(
        self, scheduler: Any, step_counts: set[int], device: torch.device, rows: int, fast: bool
    ) -> dict[int, CodeSampler]:
        return dict.fromkeys(step_counts, CodeSampler(self.code_head, self.codebook))


__all__ = ["MMARVQConfig", "MMARVQForConditionalGeneration", "MMARVQModel"]

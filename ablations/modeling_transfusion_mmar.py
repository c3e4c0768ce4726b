"""
The paper's re-implementation of Transfusion (suppl. Sec. 6.1), which MMAR is compared with: the LLM is the denoiser.

All tokens of a picture carry noise of one level and pass a linear into the LLM, with a learned embedding of the level
beside it; a linear on the LLM's output tells the noise. PLoRA, bidirectional pictures and frozen parts are MMAR's.
"""

import copy
import inspect
import numbers
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.diffusion_mmar import MMARTimestepEmbedding, cosine_alphas_cumprod
from ..modeling_mmar.embedding_vit_mmar import MMARViTLinear
from ..modeling_mmar.generation_mmar import GenerationState, start_schedule
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration, MMARModel
from ..modeling_mmar.parameterization_mmar import add_noise


AUTO_MAP = {
    "AutoConfig": "modeling_transfusion_mmar.MMARTransfusionConfig",
    "AutoModel": "modeling_transfusion_mmar.MMARTransfusionForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_transfusion_mmar.MMARTransfusionForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_transfusion_mmar.MMARTransfusionForConditionalGeneration",
}


@strict
class MMARTransfusionConfig(MMARConfig):
    r"""
    Configuration of `MMARTransfusionForConditionalGeneration`: that of MMAR, of which `vit_config` is not used but for
    `initializer_range`, and `diffusion_config` for its noise schedule, `frequency_embedding_size` and
    `prediction_type`, "epsilon" here.

    Args:
        max_understanding_level (`int`, *optional*, defaults to 500): In training the pictures that text is about
            carry noise of a level from 0 to this, and pictures to generate of one up to `num_train_timesteps` (suppl.
            Sec. 6.1).
        understanding_level (`int`, *optional*, defaults to 0): Noise level of the pictures that are read at inference;
            0 is none (Fig. 7).
        **kwargs: Of `MMARConfig`.
    """

    model_type = "mmar_transfusion"

    max_understanding_level: int = 500
    understanding_level: int = 0

    def __post_init__(self, **kwargs):
        if self.diffusion_config is None or isinstance(self.diffusion_config, dict):
            self.diffusion_config = {"prediction_type": "epsilon", **(self.diffusion_config or {})}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    @property
    def image_parts(self) -> dict[str, str]:
        """What reads and what draws image tokens; see `MMARConfig`."""
        return {
            "image input": f"a linear, pictures to read under noise of a level up to {self.max_understanding_level} "
            f"in training and of {self.understanding_level} at inference",
            "image head": f"a linear, {self.diffusion_config.prediction_type}; the language model denoises",
        }

    def validate_architecture(self):
        super().validate_architecture()
        if self.diffusion_config.prediction_type != "epsilon":
            raise ValueError(
                "`diffusion_config.prediction_type` must be 'epsilon', since the loss is that of the noise; got "
                f"{shorten(self.diffusion_config.prediction_type)}. Set it to 'epsilon', or leave it out."
            )
        self.check_levels()

    def check_levels(self) -> None:
        """Raises a `ValueError` for a noise level that there is not; they may be set after the config was made."""
        most = self.diffusion_config.num_train_timesteps
        for name in ("max_understanding_level", "understanding_level"):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"`{name}` must be between 0 and {most}, `diffusion_config.num_train_timesteps`; got "
                    f"{getattr(self, name)}."
                )


class MMARNoisyLatentEncoder(nn.Module):
    """Noisy latents and their level to the LLM's inputs: a linear, and learned embeddings of level and place."""

    def __init__(self, config: MMARTransfusionConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.input_projection = MMARViTLinear(config.latent_channels, width)
        # Level 0 is no noise; level t is timestep t - 1 of the schedule. Learned from sinusoids: a short training sees
        # some of the thousand levels a few times.
        self.level_embedding = MMARTimestepEmbedding(config.diffusion_config.frequency_embedding_size, width)
        # All tokens of a picture share a RoPE position.
        self.position_embedding = nn.Parameter(torch.zeros(config.num_latents, width))

    def forward(self, noisy_latents: Tensor, levels: Tensor) -> Tensor:
        r"""
        Args:
            noisy_latents (`torch.FloatTensor` of shape `(I, N, C)`): Tokens with noise.
            levels (`torch.LongTensor` of shape `(I,)`): How much, between 0 and T.

        Returns:
            `torch.FloatTensor` of shape `(I, N, D)`.
        """
        embeds = self.input_projection(noisy_latents.to(self.input_projection.weight.dtype))
        return embeds + self.level_embedding(levels)[:, None] + self.position_embedding


class MMARTransfusionModel(MMARModel):
    """`MMARModel` with an encoder of noisy latents in place of the one of known latents."""

    config_class = MMARTransfusionConfig

    def __init__(self, config: MMARTransfusionConfig):
        super().__init__(config)
        self.latent_encoder = MMARNoisyLatentEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MMARNoisyLatentEncoder):
            init.normal_(module.position_embedding, std=self.config.vit_config.initializer_range)
        else:
            super()._init_weights(module)


class MMARTransfusionForConditionalGeneration(MMARForConditionalGeneration):
    r"""
    The LLM as a denoiser of whole pictures; everything else is `MMARForConditionalGeneration`'s.

    In `forward` a picture with hidden latents is one to generate: all of its tokens carry noise, hidden or not, and
    the loss is that of the hidden ones. Train with all latents of such a picture hidden (`mask_ratio_min=0.999`).
    `generate_images` draws all tokens in one round: of `num_ar_steps` and `order` it makes no use.

    Example:

    ```python
    >>> from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig

    >>> MMARTransfusionConfig().diffusion_config.prediction_type
    'epsilon'
    ```
    """

    config_class = MMARTransfusionConfig
    model_class = MMARTransfusionModel
    remote_modules = ("modeling_transfusion_mmar",)

    def add_image_head(self) -> None:
        self.noise_head = MMARViTLinear(self.config.text_config.hidden_size, self.config.latent_channels)

    @property
    def image_head(self) -> nn.Module:
        return self.noise_head

    def alphas_cumprod_of(self, levels: Tensor) -> Tensor:
        """Alpha-bar of levels `(...)`: 1 at level 0, that of timestep t - 1 at level t."""
        schedule = cosine_alphas_cumprod(self.config.diffusion_config.num_train_timesteps)
        return torch.cat([torch.ones(1), schedule]).to(levels.device)[levels]

    def embed_latents(
        self,
        latent_tokens: Tensor,
        latent_mask: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_known: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents `(I, N, C)` to the LLM's inputs `(I, N, D)` with noise, and that noise with its level behind."""
        num_images, config = len(latent_tokens), self.config
        config.check_levels()
        is_generated = torch.zeros(num_images, dtype=torch.bool) if latent_mask is None else latent_mask.any(-1).cpu()
        generators = generator if isinstance(generator, list) else [generator] * num_images
        levels, noise = [], []
        for own, generated in zip(generators, is_generated.tolist(), strict=True):
            device = latent_tokens.device if own is None else own.device
            first, last = 0, config.diffusion_config.num_train_timesteps
            if not generated and self.training:
                last = config.max_understanding_level
            elif not generated:
                first = last = config.understanding_level
            levels.append(torch.randint(first, last + 1, (), generator=own, device=device))
            noise.append(torch.randn(latent_tokens.shape[1:], generator=own, device=device))
        levels = torch.stack(levels).to(latent_tokens.device)  # (I,)
        noise = torch.stack(noise).to(latent_tokens.device)  # (I, N, C)
        noisy_latents = add_noise(latent_tokens.float(), noise, self.alphas_cumprod_of(levels)[:, None, None])
        told = levels[:, None, None].expand(-1, noise.shape[1], 1)
        return self.model.latent_encoder(noisy_latents, levels), torch.cat([noise, told.to(noise)], dim=-1)

    def image_token_loss(
        self,
        latent_tokens: Tensor,
        z: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_tokens: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Squared errors of the noise `(1, M)` (Eq. 3), and the timesteps, of noise with its level `(M, C + 1)`."""
        noise, levels = latent_tokens[:, :-1], latent_tokens[:, -1].long()
        losses = (self.noise_head(z).float() - noise).square().mean(-1)[None]
        return losses, (levels - 1).clamp(min=0)[None]

    def sample_tokens(self, state: GenerationState) -> Tensor:
        """All tokens at once, by as many passes of the LLM as there are diffusion steps; see `GenerationState`."""
        if state.num_hidden != state.hidden.shape[1]:
            raise ValueError(
                f"`latent_mask` must hide all {state.hidden.shape[1]} latents, since the LLM denoises whole pictures; "
                f"got {state.num_hidden} hidden ones. Inpainting needs MMAR."
            )
        if not isinstance(state.num_inference_steps, numbers.Integral):
            raise ValueError(
                "`num_inference_steps` must be one integer, since the LLM draws in one round; got "
                f"{shorten(state.num_inference_steps)}. Give it together with the preset, or take another preset."
            )
        device, (batch, num_latents, channels) = state.tokens.device, state.tokens.shape
        scheduler = copy.deepcopy(state.scheduler)
        start_schedule(scheduler, state.num_inference_steps, device)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": state.generators} if takes_generator else {}
        shape = (num_latents, channels)
        noise = [torch.randn(shape, generator=own, device=own.device).to(device) for own in state.generators]
        noisy_latents = torch.stack(noise) * scheduler.init_noise_sigma
        num_steps = len(scheduler.timesteps)
        branches = 2 if state.is_guided else 1
        everywhere = torch.arange(num_latents, device=device).expand(branches * batch, -1)
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(noisy_latents, timestep)
            levels = (timestep.round().long() + 1).to(device).expand(batch)
            embeds = self.model.latent_encoder(scaled, levels)
            z = state.context.condition(embeds.repeat(branches, 1, 1), everywhere)
            prediction = self.noise_head(z.to(self.noise_head.weight.dtype)).float()
            if state.is_guided:
                conditional, unconditional = prediction.chunk(2)
                prediction = torch.lerp(unconditional, conditional, state.guidance_scales(1.0, num_steps)[step])
            noisy_latents = scheduler.step(prediction, timestep, noisy_latents, **step_kwargs).prev_sample
            hidden = state.hidden if step < num_steps - 1 else torch.zeros_like(state.hidden)
            noisy_latents, is_interrupted = self.call_back(state, step, num_steps, noisy_latents, hidden)
            if is_interrupted:
                break
        return noisy_latents


__all__ = ["MMARTransfusionConfig", "MMARTransfusionForConditionalGeneration", "MMARTransfusionModel"]

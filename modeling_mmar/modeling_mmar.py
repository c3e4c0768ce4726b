"""MMAR: one model for text from images and images from text (arXiv 2410.10798)."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils import (
    ModelOutput,
    is_tracing,
)

from .checks_mmar import check_forward, check_image_tokens, check_latents, check_one_of, check_pixel_values
from .configuration_mmar import IGNORE_INDEX, TRAINED_SUFFIXES, MMARConfig, shorten
from .diffusion_mmar import (
    TIMESTEP_INITIAL_STD,
    MMARDiffusionLinear,
    MMARDiffusionMLP,
    cosine_alphas_cumprod,
    diffusion_losses,
)
from .embedding_vit_mmar import MMAREmbeddingViT, MMARLatentEncoder, MMARViTLinear
from .fast_generation_mmar import MMARFastGenerationMixin
from .masking_mmar import (
    BatchCounts,
    cached_position_ids,
    forget_last_tokens,
    image_block_ids,
    next_position_ids,
    shared_position_ids,
    true_places,
)
from .plora_mmar import MMARQwen2Model
from .prefix_mmar import num_prefix_tokens
from .quantization_mmar import for_backbone_only, plora_aware_quantizers
from .saving_mmar import MMARSavingMixin, apply_umask


@dataclass
class MMARCausalLMOutputWithPast(ModelOutput):
    r"""
    Output of MMAR.

    Args:
        loss (`torch.FloatTensor`, *optional*): Sum of text loss and image loss (Eq. 4 with weights 1 : 1), where any
            applies.
        logits (`torch.FloatTensor` of shape `(B, L, vocab_size)`, *optional*): None in training with labels, where
            only labelled positions pass the `lm_head`.
        past_key_values (`Cache`, *optional*): Keys and values of the sequence so far.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Of each layer, each `(B, L, D)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Of each layer, each `(B, heads, L, L)`.
        image_hidden_states (`torch.FloatTensor` of shape `(I, N, D)`, *optional*): The LLM's output z at image tokens.
        text_loss (`torch.FloatTensor`, *optional*): Cross entropy per labelled token, in nats.
        image_loss (`torch.FloatTensor`, *optional*): Diffusion loss of the hidden latents (Eq. 8).
        token_losses (`torch.FloatTensor` of shape `(diffusion_batch_mul, M)`, *optional*): The image loss of each of
            the M hidden latents, in reading order, at each of its timesteps; without gradient.
        timesteps (`torch.LongTensor` of shape `(diffusion_batch_mul, M)`, *optional*): Those timesteps.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    token_losses: Tensor | None = None
    timesteps: Tensor | None = None


class KeepsDtype(nn.Module):
    """A module that stays in its own dtype, float32, when the model around it is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)


class MMARAutoencoderKL(KeepsDtype, AutoencoderKL):
    """diffusers' `AutoencoderKL` in float32."""

    def to_json_string(self) -> str:
        # What is saved is opened by diffusers, which has no class of this name.
        return super().to_json_string().replace(f'"{type(self).__name__}"', f'"{AutoencoderKL.__name__}"')

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if os.path.isdir(save_directory):
            apply_umask(save_directory)


class MMARRotaryEmbedding(KeepsDtype, Qwen2RotaryEmbedding):
    """Qwen2's frequencies in float32, cast or loaded: in bfloat16 the positions of a long text run into each other."""


class MMARPreTrainedModel(PreTrainedModel):
    """Weight initialization and loading shared by MMAR's models."""

    config_class = MMARConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MMARQwen2DecoderLayer", "MMARViTLayer", "MMARDiffusionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # FlashAttention-2 ignores the block mask that makes an image bidirectional.
    _supports_flash_attn = False
    # Its block masks cannot be mixed with the dense mask of image generation.
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = for_backbone_only(kwargs["quantization_config"])
        with plora_aware_quantizers():
            return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if os.path.isdir(save_directory):
            apply_umask(save_directory)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args, **kwargs) -> Any:
        # Called by `from_pretrained` for `tp_plan` and `tp_size` as well.
        for name in ("tp_plan", "tp_size", "pp_size"):
            if (value := getattr(distributed_config, name, None)) not in (None, 1):
                raise ValueError(
                    f"`{name}` must not be given, since PLoRA has no plan for tensor or pipeline parallelism; got "
                    f"{value!r}. Split the model by layers with `device_map='auto'`, or train it with FSDP."
                )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.vit_config.initializer_range
        # Keyed on the modules that own the parameters: transformers visits no others. PLoRA's are in MMARQwen2Model.
        if isinstance(module, MMAREmbeddingViT):
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, MMARLatentEncoder):
            init.normal_(module.mask_token, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, MMARDiffusionLinear):
            if module.initialization == "zero":
                init.zeros_(module.weight)
            elif module.initialization == "normal":
                init.normal_(module.weight, std=TIMESTEP_INITIAL_STD)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MMARViTLinear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and not module.elementwise_affine:
            return
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As transformers', of the language model: the other parts attend in one way, and their configs follow."""
        if isinstance(attn_implementation, dict):
            return super().set_attn_implementation(attn_implementation, allow_all_kernels)
        # Named so, transformers does not look for models of the other configs, of which there are none.
        named = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(named, allow_all_kernels)
        for name in self.config.sub_configs.keys() - named.keys():
            getattr(self.config, name)._attn_implementation_internal = self.config._attn_implementation


class MMARModel(MMARPreTrainedModel):
    """The latent encoder and the language model with PLoRA: everything up to the heads."""

    def __init__(self, config: MMARConfig):
        super().__init__(config)
        self.language_model = MMARQwen2Model(config.text_config, config.plora_rank, config.plora_alpha)
        self.language_model.rotary_emb = MMARRotaryEmbedding(config.text_config)
        self.latent_encoder = MMARLatentEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        r"""
        Where the image tokens are: by `image_token_id`, or by its embedding.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, D)`, *optional*): In place of `input_ids`.

        Returns:
            `torch.BoolTensor` of shape `(B, L)`: True at image tokens.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token).to(inputs_embeds)).all(-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        counts: BatchCounts | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Tokens; `image_token_id` marks image tokens.
            attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): RoPE positions; made here by default.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, D)`, *optional*): In place of the tokens' embeddings.
            image_embeds (`torch.FloatTensor` of shape `(I, N, D)`, *optional*): What `latent_encoder` makes of the
                images, in reading order.
            image_token_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): True at image tokens; by default where
                `image_token_id` or its embedding is.
            counts (`BatchCounts`, *optional*): Of a training batch.
            use_cache (`bool`, *optional*): Return the cache.
            return_dict (`bool`, *optional*): False returns a tuple of what is not None. Default from
                `config.return_dict`.

        Returns:
            `BaseModelOutputWithPast`

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, image tokens and images do not
                match in number, or the text is longer than the language model's positions.
        """
        check_one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        has_images = image_embeds is not None
        if image_token_mask is None and (has_images or self._may_hold_images(input_ids, past_key_values)):
            image_token_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        check_image_tokens(image_token_mask, image_embeds, self.config, counts)
        if not has_images:
            image_token_mask = None

        # 3. Embed the text and put the images in their places; the placeholder's own embedding is never read.
        gives_embeds = inputs_embeds is not None
        if not gives_embeds:
            text_ids = input_ids if image_token_mask is None else input_ids.masked_fill(image_token_mask, 0)
            inputs_embeds = self.language_model.embed_tokens(text_ids)
        num_prefix = 0
        if counts is not None and past_key_values is None and image_token_mask is not None:
            # Of embeddings made here, `requires_grad` may have been set by transformers for gradient checkpointing.
            needs_gradient = inputs_embeds.requires_grad if gives_embeds else inputs_embeds.grad_fn is not None
            if not needs_gradient:
                num_prefix = num_prefix_tokens(
                    self.language_model,
                    counts.first_image_column,
                    inputs_embeds.shape[1],
                    attention_mask,
                    kwargs.get("output_attentions"),
                )
        if image_token_mask is not None:
            inputs_embeds = inputs_embeds.masked_scatter(image_token_mask[..., None], image_embeds.to(inputs_embeds))

        # 4. Positions and attention: causal text, bidirectional images (Sec. 3.3.2).
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, image_token_mask, attention_mask, past_key_values)
        # Values are looked at only where they may be too large, and not in each decoding step, which would wait.
        if not is_tracing() and inputs_embeds.shape[1] > 1:
            total = inputs_embeds.shape[1] + (0 if isinstance(past_length, Tensor) else past_length)
            if total > self.config.text_config.max_position_embeddings:
                self._check_positions(position_ids)
        if not isinstance(attention_mask, dict):
            block_ids = None
            if image_token_mask is not None:
                block_ids = image_block_ids(image_token_mask, self.config.num_latents)
                # Full length: earlier images are complete and lie in the past of every query.
                block_ids = F.pad(block_ids, (int(past_length), 0), value=-1)
            attention_mask = {
                "full_attention": create_causal_mask(
                    config=self.config.text_config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=None,  # repeated ids would be read as packed sequences
                    block_sequence_ids=block_ids,
                )
            }

        # 5. The language model. In training PLoRA always runs, so that ranks with and without images agree.
        if image_token_mask is None and self.training:
            image_token_mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        cached = None
        # A compiled decoding step would be compiled anew for each length of what is noted.
        if use_cache is not False and (inputs_embeds.shape[1] > 1 or not is_tracing()):
            cached = cached_position_ids(past_key_values, inputs_embeds.shape[0])
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            image_token_mask=image_token_mask,
            num_image_tokens=None if counts is None else sum(counts.num_image_tokens),
            num_prefix_tokens=num_prefix,
            return_dict=True,
            **kwargs,
        )
        if cached is not None and outputs.past_key_values is not None:
            # The next token's position is not the number of cached tokens, once an image was read.
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            outputs.past_key_values.mmar_position_ids = torch.cat([cached.to(position_ids), position_ids], dim=1)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _may_hold_images(self, input_ids: Tensor | None, past_key_values: Cache | None) -> bool:
        """Whether tokens that come without images are looked at: not in decoding steps, which would wait."""
        return input_ids is not None and not (past_key_values is not None and input_ids.shape[1] == 1)

    def _check_positions(self, position_ids: Tensor) -> None:
        limit = self.config.text_config.max_position_embeddings
        if (longest := int(position_ids.max()) + 1) > limit:
            raise ValueError(
                f"the text must have at most {limit} positions (`max_position_embeddings`), one per picture; got "
                f"{longest}. Shorten it."
            )

    def _position_ids(
        self,
        inputs_embeds: Tensor,
        image_token_mask: Tensor | None,
        attention_mask: Tensor | dict | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        batch, length = inputs_embeds.shape[:2]
        padding_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        # Positions taken so far; fewer than the tokens, once a picture was read.
        start = 0
        if past_key_values is not None:
            start = next_position_ids(past_key_values, batch, padding_mask).to(inputs_embeds.device)
        if padding_mask is not None:
            padding_mask = padding_mask[:, -length:]
        if image_token_mask is None:
            image_token_mask = torch.zeros((batch, length), dtype=torch.bool, device=inputs_embeds.device)
        return shared_position_ids(image_token_mask, self.config.num_latents, padding_mask) + start


class MMARForConditionalGeneration(MMARSavingMixin, MMARPreTrainedModel, MMARFastGenerationMixin, GenerationMixin):
    r"""
    MMAR with its heads: text through the `lm_head`, pictures through the Diffusion MLP and the frozen VAE.

    Args:
        config (`MMARConfig`): The configuration.

    Example:

    ```python
    >>> from mmar import MMARForConditionalGeneration

    >>> model = MMARForConditionalGeneration.from_pretrained("checkpoints/mmar-tiny")
    >>> model.config.num_latents
    16
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["vae"]
    output_modalities = ("text", "image")
    # Losses are means, so the Trainer scales them for gradient accumulation.
    accepts_loss_kwargs = False
    # What a subclass replaces: all up to the heads, and what makes latents of pictures and pictures of latents.
    model_class = MMARModel
    vae_class = MMARAutoencoderKL

    def __init__(self, config: MMARConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.add_image_head()
        # Last, since the first parameter's dtype is the model's. Its own config holds the latent scale.
        self.vae = self.vae_class(**config.vae_config)
        self.fused_plora = None
        if config.tie_word_embeddings:
            # A Trainer that resumes does not miss what was not saved on purpose.
            self._keys_to_ignore_on_save = list(self._tied_weights_keys)
        self.post_init()
        self.freeze()

    # ---------------------------------------------------------------------- what another kind of image token replaces

    def add_image_head(self) -> None:
        """Adds the modules that draw an image token from its z."""
        config = self.config
        self.diffusion_mlp = MMARDiffusionMLP(
            config.diffusion_config, config.latent_channels, config.text_config.hidden_size
        )

    @property
    def image_head(self) -> nn.Module:
        """What draws an image token from its z."""
        return self.diffusion_mlp

    def embed_latents(
        self,
        latent_tokens: Tensor,
        latent_mask: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_known: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Latents `(I, N, C)` to the LLM's inputs `(I, N, D)`, and to what `image_token_loss` takes of each. `num_known`
        are the least and the most that the mask leaves known.
        """
        return self.model.latent_encoder(latent_tokens, latent_mask, num_known), latent_tokens

    def image_token_loss(
        self,
        latent_tokens: Tensor,
        z: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_tokens: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The image loss of each of M tokens `(M, C)` at each of its timesteps; see `diffusion_losses`."""
        diffusion = self.config.diffusion_config
        return diffusion_losses(
            self.diffusion_mlp,
            latent_tokens,
            z,
            cosine_alphas_cumprod(diffusion.num_train_timesteps).to(z.device),
            diffusion.prediction_type,
            diffusion.diffusion_batch_mul,
            generator,
            num_tokens,
        )

    def freeze(self, train_backbone: bool = False) -> None:
        r"""
        Freezes the VAE and Qwen2, and makes the rest trainable (Sec. 3.3.2).

        Args:
            train_backbone (`bool`, *optional*, defaults to `False`): Also train Qwen2's own weights; for a model whose
                backbone was not pretrained.

        Raises:
            ValueError: If a quantized backbone is to be trained.
        """
        if train_backbone and getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "`train_backbone` needs a backbone in floating point; this one is quantized. Load the model without "
                "`quantization_config`."
            )
        for parameter in self.parameters():
            if parameter.is_floating_point():  # quantized weights take no gradient
                parameter.requires_grad_(True)
        self.vae.requires_grad_(False)
        if not train_backbone:
            for name, parameter in self.named_parameters():
                is_backbone = name.startswith(("model.language_model.", "lm_head."))
                if is_backbone and not name.endswith(TRAINED_SUFFIXES):
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.train(False)
        if mode:
            self.unfuse_plora()
        return self

    def load_state_dict(self, *args, **kwargs):
        self.unfuse_plora()
        return super().load_state_dict(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------------- latents

    def encode_images(
        self,
        pixel_values: Tensor,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        r"""
        Pictures to latents of unit variance.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, H, W)`): Pictures in [-1, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`): Sample (training) or take the mode (inference).
            generator (`torch.Generator` or a list of them, *optional*): Source of the sample, one or one per picture.

        Returns:
            `torch.FloatTensor` of shape `(I, C, h, w)`, float32.

        Raises:
            ValueError: If the pictures have another size than the config's.
        """
        with torch.no_grad():
            mean, std = self.encode_image_distributions(pixel_values)
            if not sample_posterior:
                return mean
            return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device)

    @torch.no_grad()
    def encode_image_distributions(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Pictures to the mean and std of their scaled latents' posterior; what a latent cache stores.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, H, W)`): Pictures in [-1, 1].

        Returns:
            `tuple` of two `torch.FloatTensor` of shape `(I, C, h, w)`, float32.

        Raises:
            ValueError: If the pictures have another size than the config's, are integers, or have values outside
                [-1, 1].
        """
        check_pixel_values(pixel_values, self.config)
        with torch.autocast(pixel_values.device.type, enabled=False):
            posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        shift, scale = self._latent_shift_and_scale(posterior.mean)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        r"""
        Images as the language model reads them, all latents known.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, H, W)`): Images in [-1, 1].

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state`, the latents `(I, N, C)`; `pooler_output`, the language
            model's inputs `(I, N, D)`.

        Raises:
            ValueError: If `encode_images` does not take the images.
        """
        latent_tokens = self.encode_images(pixel_values).flatten(2).transpose(1, 2)
        image_embeds, _ = self.embed_latents(latent_tokens, None)
        return BaseModelOutputWithPooling(last_hidden_state=latent_tokens, pooler_output=image_embeds)

    def decode_latents(self, latents: Tensor) -> Tensor:
        r"""
        Latents of unit variance to pictures.

        Args:
            latents (`torch.FloatTensor` of shape `(I, C, h, w)`): As `encode_images` makes them.

        Returns:
            `torch.FloatTensor` of shape `(I, 3, H, W)`, float32, about [-1, 1].

        Raises:
            ValueError: If the latents have another shape than the config's, or are NaN or infinite.
        """
        check_latents(latents, None, self.config)
        shift, scale = self._latent_shift_and_scale(latents)
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode((latents.float() / scale + shift).to(self.vae.dtype)).sample.float()

    def _latent_shift_and_scale(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        if config.latents_std is not None:
            shift, std = (
                latents.new_tensor(v, dtype=torch.float32) for v in (config.latents_mean, config.latents_std)
            )
            return shift[:, None, None], 1 / std[:, None, None]
        shift = config.shift_factor or 0.0
        return tuple(torch.tensor(v, device=latents.device) for v in (shift, float(config.scaling_factor)))

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_token_type_ids: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        loss_weights: tuple[float | Tensor, float | Tensor] = (1.0, 1.0),
        return_dict: bool | None = None,
        **kwargs,
    ) -> MMARCausalLMOutputWithPast | tuple:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Tokens, `num_latents` marks per picture.
            attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): RoPE positions, one for each picture.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, D)`, *optional*): In place of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(I, 3, H, W)`, *optional*): All pictures of the batch in
                reading order, in [-1, 1].
            latents (`torch.FloatTensor` of shape `(I, C, h, w)`, *optional*): Scaled latents in place of pictures.
            latent_mask (`torch.BoolTensor` of shape `(I, N)`, *optional*): True where a latent is hidden and its
                diffusion loss is taken. Without it every picture is fully known.
            image_token_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): True at image tokens; by default where
                `image_token_id` or, in `inputs_embeds`, its embedding is.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): Tokens to predict, -100 elsewhere.
            use_cache (`bool`, *optional*): Return the cache.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Logits of the last so many positions
                only; 0 keeps all.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): 1 at image tokens; for pipelines, the
                token ids already tell.
            generator (`torch.Generator` or a list of them, *optional*): Source of posterior samples, timesteps and
                noise; one for each picture makes them independent of the batch.
            loss_weights (`tuple` of two, *optional*, defaults to `(1.0, 1.0)`): Of the text loss and the image loss
                (Eq. 4); the losses themselves are returned without them.
            return_dict (`bool`, *optional*): False returns a tuple of what is not None, loss and logits first. Default
                from `config.return_dict`.

        Returns:
            `MMARCausalLMOutputWithPast`

        Raises:
            ValueError: If both pictures and latents are given, an input is no tensor, shapes are wrong, or image
                tokens and pictures do not match in number.
        """
        # Collated with other batches in mind, a batch of texts may bring no images as an empty tensor.
        if _is_empty(pixel_values) or _is_empty(latents):
            pixel_values, latents = (None if _is_empty(value) else value for value in (pixel_values, latents))
        if pixel_values is None and latents is None and _is_empty(latent_mask):
            latent_mask = None
        check_forward(
            self.config,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            image_token_mask=image_token_mask,
            labels=labels,
            pixel_values=pixel_values,
            latents=latents,
            latent_mask=latent_mask,
        )

        # 1. Encode latents: the posterior is sampled in training, its mode is read at inference.
        if pixel_values is not None:
            latents = self.encode_images(pixel_values, sample_posterior=self.training, generator=generator)
        has_images = latents is not None
        # (I, C, h, w) -> (I, N, C)
        latent_tokens = latents.flatten(2).transpose(1, 2) if has_images else None
        if self.training and has_images and latent_mask is None:
            # The same images, computed in a way in which the mask token takes part.
            latent_mask = torch.zeros(latent_tokens.shape[:2], dtype=torch.bool, device=latent_tokens.device)
        if has_images and image_token_mask is None and (input_ids is None) != (inputs_embeds is None):
            image_token_mask = self.model.get_placeholder_mask(input_ids, inputs_embeds)
        predicts = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX
        counts = None
        if self.training or labels is not None or latent_mask is not None:
            counts = BatchCounts.of(image_token_mask, predicts, latent_mask)

        # 2. Hide latents, embed the images (Fig. 2).
        image_embeds, targets = None, None
        if has_images:
            num_known = None if counts is None else counts.num_known(self.config.num_latents)
            image_embeds, targets = self.embed_latents(latent_tokens, latent_mask, generator, num_known)

        # 3. to 5. Build the sequence, run the LLM.
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            image_token_mask=image_token_mask,
            counts=counts if self.training else None,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        # 6. Text head: in training only labelled positions pass the lm_head.
        logits, text_loss = None, None
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            logits = self.lm_head(hidden_states[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        if counts is not None and counts.num_labels:
            places = true_places(predicts, counts.num_labels).to(hidden_states.device)
            next_tokens = F.pad(labels[:, 1:], (0, 1)).flatten().to(places.device)[places]
            text_loss = F.cross_entropy(self.lm_head(hidden_states.flatten(0, 1)[places]).float(), next_tokens)

        # 7. Image head: z at a hidden latent predicts that latent (Eq. 8).
        z, image_loss, token_losses, timesteps = None, None, None, None
        if has_images:
            num_images, num_latents = latent_tokens.shape[:2]
            # (B, L, D) -> (I, N, D)
            places = true_places(image_token_mask, num_images * num_latents).to(hidden_states.device)
            z = hidden_states.flatten(0, 1)[places].view(num_images, num_latents, -1)
        if has_images and counts is not None and sum(counts.num_hidden):
            places = true_places(latent_mask, sum(counts.num_hidden)).to(z.device)
            token_losses, timesteps = self.image_token_loss(
                targets.flatten(0, 1).to(places.device)[places],
                z.flatten(0, 1)[places],
                generator,
                counts.num_hidden if isinstance(generator, list) else None,
            )
            image_loss, token_losses = token_losses.mean(), token_losses.detach()

        # Eq. 4.
        parts = zip(loss_weights, (text_loss, image_loss), strict=True)
        losses = [weight * part for weight, part in parts if part is not None]
        if self.training and losses:
            losses.append(self._unused_heads(hidden_states, text_loss, image_loss, targets))
        result = MMARCausalLMOutputWithPast(
            loss=sum(losses) if losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=z,
            text_loss=text_loss,
            image_loss=image_loss,
            token_losses=token_losses,
            timesteps=timesteps,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _unused_heads(
        self, hidden_states: Tensor, text_loss: Tensor | None, image_loss: Tensor | None, targets: Tensor | None
    ) -> Tensor:
        """Zero, through the parts that a batch leaves out: all ranks must run the same ones."""
        device = hidden_states.device
        output = torch.zeros((), device=device)
        if text_loss is None and self.lm_head.weight.requires_grad:
            output = output + self.lm_head(hidden_states[:1, :1]).float().sum()
        # Not from the generator of all, which must not hang on what a batch holds.
        generator = torch.Generator(device).manual_seed(0)
        if targets is None:
            tokens = torch.zeros(1, self.config.num_latents, self.config.latent_channels, device=device)
            nothing_hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
            embeds, targets = self.embed_latents(tokens, nothing_hidden, generator, (self.config.num_latents,) * 2)
            output = output + embeds.float().sum()
        if image_loss is None:
            losses, _ = self.image_token_loss(targets[:1, 0], hidden_states[:1, 0], generator)
            output = output + losses.sum()
        return 0.0 * output

    # ------------------------------------------------------------------------------------------------ text generation

    def generate(self, *args, generation_mode: str | None = None, **kwargs) -> Any:
        r"""
        Generates text (`generation_mode` "text" or None, see `GenerationMixin.generate`) or pictures ("image", see
        `generate_images`).

        Raises:
            ValueError: For another `generation_mode`, several pictures of a row, or a prompt with pictures that is to
                be read in chunks; or if prompt and answer need more positions than the model has.
        """
        if generation_mode == "image":
            if (number := kwargs.get("num_return_sequences")) not in (None, 1):
                raise ValueError(
                    f"`num_return_sequences` must be 1 for pictures; got {number}. Repeat the rows of `input_ids`, or "
                    "draw with `MMARPipeline`, which takes `num_images_per_prompt`."
                )
            # transformers' "any-to-any" passes lengths and token ids for text even here.
            for_text = vars(GenerationConfig()).keys() - inspect.signature(self.generate_images).parameters
            kwargs = {name: value for name, value in kwargs.items() if name not in for_text}
            if not args and "input_ids" not in kwargs:
                raise ValueError(
                    "expected `input_ids`, the text before the picture; got none. "
                    "`MMARProcessor.generation_inputs` makes them."
                )
            null_prompt_ids = self.config.null_prompt_ids
            if null_prompt_ids is not None and kwargs.get("negative_input_ids") is None:
                input_ids = args[0] if args else kwargs["input_ids"]
                kwargs["negative_input_ids"] = input_ids.new_tensor(null_prompt_ids).repeat(len(input_ids), 1)
            return self.generate_images(*args, **kwargs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"`generation_mode` must be 'text' or 'image'; got {shorten(generation_mode)}.")
        given = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}
        given |= {"input_ids": args[0]} if args else {}
        check_forward(self.config, **given)
        self._check_prompt_and_answer(*args, **kwargs)
        if isinstance(cache := kwargs.get("past_key_values"), Cache):
            self._fit_cache(cache, **given)
        return super().generate(*args, **kwargs)

    def _fit_cache(
        self,
        cache: Cache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        """
        Sees to it that a cache leaves something to read.

        Inputs are the complete chat, of which the cache holds the beginning, unless the attention mask is longer: then
        they are what is new.

        Raises:
            ValueError: If the inputs are neither.
        """
        past_length = int(cache.get_seq_length())
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if past_length == 0 or inputs is None:
            return
        length = inputs.shape[1]
        mask_length = length if attention_mask is None else attention_mask.shape[1]
        is_complete = mask_length == length >= past_length
        is_new = mask_length == past_length + length and inputs_embeds is None  # transformers takes all embeddings
        if not is_complete and not is_new:
            raise ValueError(
                f"with {past_length} tokens in `past_key_values`, `attention_mask` must have {past_length + length} "
                f"columns, if the {length} tokens given are new, or {length}, if they are the complete chat and at "
                f"least as long as the cache; got {mask_length}. Give both in full."
            )
        if is_complete and length == past_length:
            # All has been read: the last token once more, for what follows it; an image at the end as one.
            ends_in_image = self.model.get_placeholder_mask(input_ids, inputs_embeds)[:, -1].any()
            forget_last_tokens(cache, self.config.num_latents if bool(ends_in_image) else 1)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # The image token stands for a picture and is never written.
        suppressed = generation_config.suppress_tokens or []
        generation_config.suppress_tokens = sorted({*suppressed, self.config.image_token_id})
        return generation_config, model_kwargs

    def _check_prompt_and_answer(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ) -> None:
        """
        Raises a `ValueError` if prompt and answer need more positions than the language model has, or chunks of the
        prompt would cut its pictures.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            return
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        is_image = input_ids == self.config.image_token_id
        if settings.prefill_chunk_size is not None and bool(is_image.any()):
            raise ValueError(
                "a prompt with pictures is read as a whole, since all tokens of a picture see each other; got "
                f"`prefill_chunk_size` {settings.prefill_chunk_size}. Leave it out."
            )
        num_new = settings.max_new_tokens
        if num_new is None:
            given = (kwargs.get("max_length"), getattr(generation_config, "max_length", None))
            is_default = all(length is None for length in (*given, self.generation_config.max_length))
            # By default transformers writes so many tokens more; a length that is given counts the prompt.
            num_new = settings.max_length - (0 if is_default else input_ids.shape[1])
        attention_mask, start = kwargs.get("attention_mask"), 0
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            # Only the new tokens were given, with a cache.
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else next_position_ids(cache, input_ids.shape[0], attention_mask)
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        position_ids = shared_position_ids(is_image, self.config.num_latents, attention_mask)
        longest = int((position_ids + start).max()) + 1
        limit = self.config.text_config.max_position_embeddings
        if longest + max(num_new, 0) > limit:
            raise ValueError(
                f"prompt and answer must have at most {limit} positions (`max_position_embeddings`), one per picture; "
                f"got {longest} and up to {num_new} new tokens. Shorten the prompt or lower `max_new_tokens`."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        # Without a cache every step reads the pictures again.
        reads_pictures = is_first_iteration or not kwargs.get("use_cache", True)
        if not reads_pictures and kwargs.get("next_sequence_length") not in (None, 1):
            # The prompt of an assistant, whose first iteration is not said to be one.
            cache = kwargs.get("past_key_values")
            reads_pictures = cache is None or int(cache.get_seq_length()) == 0
        pictures = {"pixel_values": kwargs.pop("pixel_values", None), "latents": latents, "latent_mask": latent_mask}
        pictures = {name: value for name, value in pictures.items() if value is not None} if reads_pictures else {}
        num_read = kwargs.get("next_sequence_length")
        kwargs["mm_token_type_ids"] = None
        # A decoding step needs no mask of pictures, and looking for them would sync.
        if pictures or num_read is None or num_read > 1:
            embeds = inputs_embeds if is_first_iteration else None
            is_image = self._image_token_mask(input_ids, embeds, image_token_mask, bool(pictures))
            kwargs["mm_token_type_ids"] = is_image.long()
            if num_read is not None:
                num_read = int(num_read)
                pictures = self._not_cached(pictures, is_image, num_read)
            if pictures and image_token_mask is not None:
                pictures["image_token_mask"] = is_image if num_read is None else is_image[:, -num_read:]
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs.pop("mm_token_type_ids", None)
        return {**inputs, **pictures}

    def _image_token_mask(
        self, input_ids: Tensor, inputs_embeds: Tensor | None, image_token_mask: Tensor | None, has_images: bool
    ) -> Tensor:
        """True at the image tokens `(B, L)` of what `generate` was given, and of what it has written since."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if image_token_mask is not None:
            # What was written is text.
            return F.pad(image_token_mask, (0, inputs.shape[1] - image_token_mask.shape[1])).bool()
        if inputs_embeds is not None and not has_images:
            return torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return self.model.get_placeholder_mask(None if inputs_embeds is not None else input_ids, inputs_embeds)

    def _images_per_row(self, is_image: Tensor, num_images: int, num_read: int) -> Tensor | None:
        """How many of the images given each row has: all of its text's, or those of the last `num_read` columns."""
        for columns in (is_image, is_image[:, is_image.shape[1] - num_read :]):
            counts = columns.sum(-1).div(self.config.num_latents, rounding_mode="floor")
            if int(counts.sum()) == num_images:
                return counts
        return None

    def _not_cached(self, pictures: dict[str, Tensor], is_image: Tensor, num_read: int) -> dict[str, Tensor]:
        """The images of the last `num_read` columns, in reading order: a cache holds the others."""
        new = is_image[:, is_image.shape[1] - num_read :].sum(-1).div(self.config.num_latents, rounding_mode="floor")
        kept = {}
        for name, value in pictures.items():
            given = self._images_per_row(is_image, value.shape[0], num_read)
            if given is None or value.shape[0] == int(new.sum()):
                kept[name] = value  # `forward` looks at numbers that do not fit
            elif bool(new.any()):
                rows = zip(value.split(given.tolist()), new.tolist(), strict=True)
                kept[name] = torch.cat([row[len(row) - number :] for row, number in rows])
        return kept

    @staticmethod
    def create_masks_for_generate(
        config: MMARConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Tensor | None] | Tensor | None:
        """Masks for static caches: the common ones, with each picture one bidirectional block."""
        block_ids = None
        if mm_token_type_ids is not None and bool(mm_token_type_ids.any()):
            past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            block_ids = image_block_ids(mm_token_type_ids.bool(), config.num_latents)
            block_ids = F.pad(block_ids, (past_length, 0), value=-1)
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,
            block_sequence_ids=block_ids,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        input_ids, embeds = model_kwargs.get("input_ids", inputs_tensor), None
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        image_token_mask = model_kwargs.get("image_token_mask")
        has_images = any(model_kwargs.get(name) is not None for name in ("pixel_values", "latents"))
        # Of images in the past the embeddings tell too.
        has_images = has_images or (cache is not None and int(cache.get_seq_length()) > 0)
        if inputs_tensor.ndim == 3:
            embeds = inputs_tensor
        if input_ids.ndim != 2 or (embeds is None and input_ids.shape[1] == 0):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        is_image = self._image_token_mask(input_ids, embeds, image_token_mask, has_images)
        if attention_mask is None or attention_mask.shape == is_image.shape:
            return shared_position_ids(is_image, self.config.num_latents, attention_mask)
        # Only the new tokens were given, with a cache: count on from it.
        if cache is None:
            raise ValueError(
                f"`attention_mask` must have the shape {tuple(is_image.shape)} of `input_ids`; got "
                f"{tuple(attention_mask.shape)}."
            )
        start = next_position_ids(cache, is_image.shape[0], attention_mask).to(is_image.device)
        new_mask = attention_mask[:, -is_image.shape[1] :]
        return shared_position_ids(is_image, self.config.num_latents, new_mask) + start

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple[Tensor, dict[str, Any]]:
        if expand_size == 1:
            return input_ids, model_kwargs
        pictures = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "latents", "latent_mask")}
        given = {name: value for name, value in pictures.items() if value is not None}
        if given:
            cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
            is_image = self._image_token_mask(input_ids, embeds, model_kwargs.get("image_token_mask"), True)
            num_read = max(is_image.shape[1] - (0 if cache is None else int(cache.get_seq_length())), 0)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        # A row's pictures are repeated as a group: a row may hold none or several.
        for name, value in given.items():
            if (counts := self._images_per_row(is_image, value.shape[0], num_read)) is None:
                raise ValueError(
                    f"expected one picture in `{name}` for each {self.config.num_latents} image tokens of the "
                    f"text, {int(is_image.sum()) // self.config.num_latents}; got {len(value)}. `MMARProcessor` "
                    "expands the image marks."
                )
            groups = [group.repeat(expand_size, *[1] * (value.ndim - 1)) for group in value.split(counts.tolist())]
            model_kwargs[name] = torch.cat(groups)
        return input_ids, model_kwargs


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (0,)


__all__ = [
    "MMARAutoencoderKL",
    "MMARCausalLMOutputWithPast",
    "MMARForConditionalGeneration",
    "MMARModel",
    "MMARPreTrainedModel",
]

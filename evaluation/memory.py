"""
Memory that an MMAR needs, from its config alone: no weight is made, every step runs on the meta device.

    mmar memory mmar-0.5b mmar-7b --batch_size 1

Counted are the tensors that are alive at the same time, as they are allocated and freed by one drawing step, one
answer and one training step. On the meta device attention keeps its weights, which fused kernels do not; what CUDA and
its allocator's fragments need comes on top.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Qwen2Model

from ..conversion.init_from_qwen2 import DTYPES, load_preset
from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.diffusion_mmar import cosine_alphas_cumprod, diffusion_loss
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration


# float32 numbers that AdamW keeps per trained weight: its two moments.
ADAMW_STATES = 2
PARTS = ("weights", "gradients", "optimizer", "EMA", "autocast", "activations", "cache")


class AllocatedMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active, and their peak; works on every device."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size


def peak_of(run: Callable[[], Any]) -> int:
    """Largest number of bytes alive at a time while `run` runs, beyond what there was before."""
    with AllocatedMemory() as memory:
        run()
    return memory.peak


def meta_model(config: MMARConfig, dtype: torch.dtype) -> MMARForConditionalGeneration:
    """
    A model without weights, in which all but the VAE is of `dtype`; raises a `ValueError` for what only builds on
    MMAR and has another head.
    """
    if type(config) is not MMARConfig:
        raise ValueError(
            f"expected the config of an MMAR, whose steps are known here; got that of a {shorten(config.model_type)}. "
            "Name MMAR's own of the same size."
        )
    with torch.device("meta"):
        return MMARForConditionalGeneration(config).to(dtype)


def weights_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes(config: MMARConfig, num_tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """Keys and values of `num_tokens` tokens."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    element = torch.empty((), dtype=dtype).element_size()
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * num_tokens * batch_size * element


def _language_model(
    model: MMARForConditionalGeneration, embeds: Tensor, num_images: int, cache: DynamicCache | None = None
) -> Tensor:
    """The language model over text and then `num_images` pictures per row."""
    batch, length, _ = embeds.shape
    num_latents = num_images * model.config.num_latents
    is_image = torch.arange(length, device=embeds.device).expand(batch, -1) >= length - num_latents
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool, device=embeds.device)
    # Past MMAR's own `forward`, which looks for the image tokens' numbers: the meta device has none.
    return Qwen2Model.forward(
        model.model.language_model,
        inputs_embeds=embeds,
        attention_mask={"full_attention": mask},
        position_ids=torch.zeros(batch, length, dtype=torch.long, device=embeds.device),
        image_tokens=is_image,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def training_step(model: MMARForConditionalGeneration, batch_size: int, text_length: int) -> Tensor:
    """
    The loss of rows of a text with labels and a picture, known to EmbeddingViT and hidden to the Diffusion MLP: each
    part gets the most that any of the three tasks gives it.
    """
    config, device = model.config, model.device
    tokens = torch.zeros(batch_size, config.num_latents, config.latent_channels, device=device)
    ids = torch.zeros(batch_size, text_length, dtype=torch.long, device=device)
    image_embeds = model.model.latent_encoder(tokens)
    embeds = torch.cat([model.get_input_embeddings()(ids), image_embeds], dim=1)
    hidden_states = _language_model(model, embeds, num_images=1)
    text_loss = F.cross_entropy(model.lm_head(hidden_states[:, :text_length].flatten(0, 1)).float(), ids.flatten())
    diffusion = config.diffusion_config
    image_loss = diffusion_loss(
        model.diffusion_mlp,
        tokens.flatten(0, 1),
        hidden_states[:, text_length:].flatten(0, 1),
        cosine_alphas_cumprod(diffusion.num_train_timesteps).to(device),
        diffusion.prediction_type,
        diffusion.diffusion_batch_mul,
    )
    return text_loss + image_loss


def make_gradients(model: nn.Module) -> None:
    """Gradients of zeros, as from an earlier step whose gradients are accumulated."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def training_memory(
    config: MMARConfig,
    batch_size: int = 1,
    text_length: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = True,
    train_backbone: bool = False,
) -> dict[str, int]:
    r"""
    Bytes of a training step with AdamW and EMA on one device.

    Args:
        config (`MMARConfig`): The model.
        batch_size (`int`, *optional*, defaults to 1): Rows per step.
        text_length (`int`, *optional*, defaults to 128): Tokens of text per row, beside the picture's.
        dtype (`torch.dtype`, *optional*): Of frozen weights and activations; what is trained is kept in float32, with
            gradients, moments and average.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether layers run again in the backward pass.
        train_backbone (`bool`, *optional*, defaults to `False`): As in `MMARForConditionalGeneration.freeze`.

    Returns:
        `dict[str, int]`: By part; without the parts that come on top of PyTorch's tensors.

    Raises:
        ValueError: If the config is of another system than MMAR.
    """
    model = meta_model(config, dtype).train()
    model.freeze(train_backbone)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    make_gradients(model)
    in_float32 = torch.float32.itemsize * trained
    return {
        "weights": frozen + in_float32,
        "gradients": in_float32,
        "optimizer": ADAMW_STATES * in_float32,
        "EMA": in_float32,
        # An upper bound: each float32 weight that is multiplied is cast, and the copy kept while autocast is on.
        "autocast": 0 if dtype == torch.float32 else dtype.itemsize * trained,
        "activations": peak_of(lambda: training_step(model, batch_size, text_length).backward()),
    }


@torch.no_grad()
def inference_memory(
    config: MMARConfig, batch_size: int = 1, text_length: int = 128, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    r"""
    Bytes of drawing pictures with guidance, or of answering about one, whichever is more.

    Args:
        config (`MMARConfig`): The model.
        batch_size (`int`, *optional*, defaults to 1): Pictures or questions at a time.
        text_length (`int`, *optional*, defaults to 128): Tokens of the prompt, or of question and answer.
        dtype (`torch.dtype`, *optional*): Of all weights but the VAE's.

    Returns:
        `dict[str, int]`: By part.

    Raises:
        ValueError: If the config is of another system than MMAR.
    """
    model = meta_model(config, dtype).eval()
    device, num_latents = model.device, config.num_latents

    def draw() -> None:
        # Both branches of guidance, all of the picture's tokens behind the prompt's.
        embeds = torch.zeros(2 * batch_size, num_latents, config.text_config.hidden_size, dtype=dtype, device=device)
        tokens = torch.zeros(2 * batch_size, num_latents, config.latent_channels, device=device)
        z = _language_model(model, embeds + model.model.latent_encoder(tokens), num_images=1).flatten(0, 1)
        timesteps = torch.zeros(len(z), dtype=torch.long, device=device)
        model.diffusion_mlp(tokens.flatten(0, 1), timesteps, z)

    def decode() -> None:
        shape = (batch_size, config.latent_channels, config.latent_size, config.latent_size)
        model.vae.decode(torch.zeros(shape, dtype=model.vae.dtype, device=device))

    def encode() -> None:
        shape = (batch_size, 3, config.image_size, config.image_size)
        model.vae.encode(torch.zeros(shape, dtype=model.vae.dtype, device=device))

    def read() -> None:
        length = text_length + num_latents
        embeds = torch.zeros(batch_size, length, config.text_config.hidden_size, dtype=dtype, device=device)
        model.lm_head(_language_model(model, embeds, num_images=1)[:, -1:])

    return {
        "weights": weights_bytes(model),
        "cache": cache_bytes(config, text_length + num_latents, 2 * batch_size, dtype),
        "activations": max(peak_of(run) for run in (draw, decode, encode, read)),
    }


def table(rows: dict[str, dict[str, int]]) -> str:
    """Gigabytes (1e9 bytes) by part, as Markdown."""
    parts = [part for part in PARTS if any(part in row for row in rows.values())]
    lines = [f"| GB | {' | '.join(parts)} | together |", "| --- |" + " --- |" * (len(parts) + 1)]
    for name, row in rows.items():
        numbers = [f"{row[part] / 1e9:.2f}" if part in row else "" for part in parts]
        lines.append(f"| {name} | {' | '.join(numbers)} | {sum(row.values()) / 1e9:.2f} |")
    return "\n".join(lines)


def main(presets: Sequence[str], batch_size: int, text_length: int, dtype: str) -> None:
    """Prints the table of presets or folders with a config.json; raises a `ValueError` as `load_preset` does."""
    rows = {}
    for preset in presets:
        config, shape = load_preset(preset), (batch_size, text_length, DTYPES[dtype])
        rows[f"{preset}, inference"] = inference_memory(config, *shape)
        rows[f"{preset}, training"] = training_memory(config, *shape)
        rows[f"{preset}, training without checkpointing"] = training_memory(config, *shape, False)
    print(table(rows))

"""Attention blocks, shared positions, mask ratios, orders and the tokens per autoregressive step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, StaticLayer

from .configuration_mmar import shorten


# Truncated normal of the mask ratio (MAR): mean 1, std 0.25, on [0.7, 1] in stage 1; Sec. 3.3.3 gives the bounds.
MASK_RATIO_MEAN = 1.0
MASK_RATIO_STD = 0.25
# In which the latents of a picture are drawn: at random (Sec. 3.3.1); at random, but first those that share no side;
# row by row.
ORDERS = ("random", "checkerboard", "raster")


def image_block_ids(image_token_mask: Tensor, num_latents: int) -> Tensor:
    r"""
    Numbers the pictures of each sequence: tokens of one picture attend to each other (Sec. 3.3.2).

    Args:
        image_token_mask (`torch.BoolTensor` of shape `(B, L)`): True at image tokens.
        num_latents (`int`): N, tokens per picture.

    Returns:
        `torch.LongTensor` of shape `(B, L)`: The picture's number within its sequence on image tokens, else -1.
    """
    index = (image_token_mask.long().cumsum(-1) - 1).div(num_latents, rounding_mode="floor")
    return index.masked_fill(~image_token_mask, -1)


def shared_position_ids(image_token_mask: Tensor, num_latents: int, attention_mask: Tensor | None = None) -> Tensor:
    r"""
    RoPE positions: all tokens of one picture share one id, the next token takes the next id (Sec. 3.3.2).

    Args:
        image_token_mask (`torch.BoolTensor` of shape `(B, L)`): True at image tokens.
        num_latents (`int`): N, tokens per picture.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding, which takes no position.

    Returns:
        `torch.LongTensor` of shape `(B, L)`; padding gets 0.
    """
    rank = image_token_mask.long().cumsum(-1) - 1
    advances = ~image_token_mask | (rank % num_latents == 0)
    if attention_mask is not None:
        advances = advances & attention_mask.bool()
    position_ids = (advances.long().cumsum(-1) - 1).clamp(min=0)
    return position_ids if attention_mask is None else position_ids.masked_fill(attention_mask == 0, 0)


def cached_position_ids(cache: Cache | None, batch: int) -> Tensor:
    r"""
    RoPE positions of the tokens in a cache, which MMAR's forward keeps on it; they follow `cache.crop`.

    Args:
        cache (`Cache`, *optional*): Keys and values of earlier tokens.
        batch (`int`): B.

    Returns:
        `torch.LongTensor` of shape `(B, past)`.

    Raises:
        ValueError: If the cache holds another number of rows.
    """
    past_length = 0 if cache is None else int(cache.get_seq_length())
    position_ids = getattr(cache, "mmar_position_ids", None)
    if position_ids is None or past_length == 0:
        position_ids = torch.empty(batch, 0, dtype=torch.long)
    position_ids = _of_rows(cache, position_ids, batch)[:, :past_length]
    if position_ids.shape[1] == past_length:
        return position_ids
    # Tokens that passed by unnoticed (a compiled decoding step) are text: each takes the next position.
    start = position_ids.amax(-1, keepdim=True) + 1 if position_ids.shape[1] else 0
    missing = torch.arange(past_length - position_ids.shape[1], device=position_ids.device).expand(batch, -1)
    return torch.cat([position_ids, missing + start], dim=1)


def _of_rows(cache: Cache | None, position_ids: Tensor, batch: int) -> Tensor:
    """The positions of a cache's rows, of which `Cache.batch_repeat_interleave` may have made more."""
    rows = position_ids.shape[0]
    if rows == batch:
        return position_ids
    if cache.layers[0].keys.shape[0] != batch or batch % rows:
        raise ValueError(f"the cache holds the positions of {rows} rows; got {batch}. Read the prompt again.")
    return position_ids.repeat_interleave(batch // rows, dim=0)


def next_position_ids(cache: Cache | None, batch: int, attention_mask: Tensor | None = None) -> Tensor:
    r"""
    The RoPE position that the next token of each row takes, without a host sync.

    Args:
        cache (`Cache`, *optional*): Keys and values of earlier tokens.
        batch (`int`): B.
        attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 0 at padding, which takes no position.

    Returns:
        `torch.LongTensor` of shape `(B, 1)`.

    Raises:
        ValueError: If the cache holds another number of rows.
    """
    past_length = 0 if cache is None else cache.get_seq_length()
    position_ids = getattr(cache, "mmar_position_ids", None)
    if position_ids is None or (isinstance(past_length, int) and past_length == 0):
        position_ids = torch.empty(batch, 0, dtype=torch.long)
    device = past_length.device if isinstance(past_length, Tensor) else position_ids.device
    position_ids = _of_rows(cache, position_ids, batch).to(device)
    noted = position_ids.shape[1]
    is_taken = (torch.arange(noted, device=device) < past_length).expand(batch, -1)
    if attention_mask is not None and attention_mask.shape[1] >= noted:
        is_taken = is_taken & attention_mask[:, :noted].to(device).bool()
    # With a column of -1, so that no row is empty.
    following = F.pad(position_ids.masked_fill(~is_taken, -1), (1, 0), value=-1).amax(-1, keepdim=True) + 1
    # Tokens that passed by unnoticed are text: each has taken a position.
    unnoticed = past_length - noted
    return following + (unnoticed.clamp(min=0) if isinstance(unnoticed, Tensor) else max(unnoticed, 0))


def forget_last_tokens(cache: Cache, num_tokens: int) -> None:
    """Takes the last `num_tokens` tokens out of a cache, static ones too."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(num_tokens)
        else:
            layer.crop(-num_tokens)


@dataclass
class BatchCounts:
    r"""
    What a training batch holds, asked of the device once: each question would wait for it.

    Args:
        num_image_tokens (`list[int]`): Image tokens of each row.
        first_image_column (`int`): The first column with an image token in any row; 0 without image tokens.
        num_labels (`int`): Positions that predict a labelled token.
        num_hidden (`list[int]`): Hidden latents of each image.
    """

    num_image_tokens: list[int]
    first_image_column: int
    num_labels: int
    num_hidden: list[int]

    @classmethod
    def of(cls, image_token_mask: Tensor | None, predicts: Tensor | None, latent_mask: Tensor | None) -> "BatchCounts":
        """Counts of masks `(B, L)`, `(B, L)` and `(I, N)`, each True at what is counted; None counts nothing."""
        parts = []
        if image_token_mask is not None:
            parts += [image_token_mask.any(0).int().argmax()[None], image_token_mask.sum(-1)]
        if predicts is not None:
            parts += [predicts.sum()[None]]
        if latent_mask is not None:
            parts += [latent_mask.sum(-1)]
        values = iter(torch.cat([part.to(parts[0].device) for part in parts]).tolist() if parts else [])
        first_image_column, rows = 0, []
        if image_token_mask is not None:
            first_image_column, rows = next(values), [next(values) for _ in image_token_mask]
        return cls(rows, first_image_column, 0 if predicts is None else next(values), list(values))

    def num_known(self, num_latents: int) -> tuple[int, int] | None:
        """The least and the most known latents of any image."""
        if not self.num_hidden:
            return None
        return num_latents - max(self.num_hidden), num_latents - min(self.num_hidden)


def true_places(mask: Tensor, count: int) -> Tensor:
    """Indices `(count,)` of the True elements of a flattened mask, in order, without asking the device how many."""
    return (~mask.flatten()).int().argsort(stable=True)[:count]


def sample_mask_ratios(num_images: int, minimum: float, generator: torch.Generator | None = None) -> Tensor:
    r"""
    Draws mask ratios from a normal of mean 1 and std 0.25 truncated to [`minimum`, 1] (MAR; Sec. 3.3.3).

    Args:
        num_images (`int`): How many.
        minimum (`float`): 0.7 in stage 1, 0 in stages 2 and 3.
        generator (`torch.Generator`, *optional*): Source of randomness.

    Returns:
        `torch.FloatTensor` of shape `(num_images,)`, in [`minimum`, 1].
    """
    if not 0 <= minimum < 1:
        raise ValueError(f"`minimum` must be in [0, 1), the lower bound of the mask ratio; got {minimum}.")
    low = 0.5 * (1 + math.erf((minimum - MASK_RATIO_MEAN) / (MASK_RATIO_STD * math.sqrt(2))))
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(num_images, generator=generator, device=device, dtype=torch.float64)
    # Inverse of the normal's distribution function between `minimum` and the mean, where it is 1 / 2.
    quantile = (low + uniform * (0.5 - low)).clamp(min=1e-12)
    ratios = MASK_RATIO_MEAN + MASK_RATIO_STD * math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    return ratios.clamp(minimum, 1.0).float()


def sample_orders(
    num_images: int, num_latents: int, generators: list[torch.Generator] | None = None, order: str = "random"
) -> Tensor:
    """
    A permutation of the latent positions per picture: `(num_images, num_latents)`, int64. Each picture's generator is
    asked for one (Sec. 3.3.1), whatever the order is.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {', '.join(ORDERS)}; got {shorten(order)}.")
    generators = generators if generators is not None else [None] * num_images
    devices = ["cpu" if generator is None else generator.device for generator in generators]
    orders = [
        torch.randperm(num_latents, generator=generator, device=device)
        for generator, device in zip(generators, devices, strict=True)
    ]
    if order == "raster":
        orders = [own.sort().values for own in orders]
    elif order == "checkerboard":
        size = math.isqrt(num_latents)
        # Stable: within a colour the order stays random.
        orders = [own[((own // size + own % size) % 2).argsort(stable=True)] for own in orders]
    return torch.stack(orders)


def sample_latent_mask(
    num_images: int,
    num_latents: int,
    minimum: float,
    generator: torch.Generator | None = None,
    mask_ratios: Tensor | None = None,
) -> Tensor:
    r"""
    Hides a random part of each picture for training; at least one latent is hidden.

    Args:
        num_images (`int`): How many pictures.
        num_latents (`int`): N, tokens per picture.
        minimum (`float`): Lower bound of the mask ratio.
        generator (`torch.Generator`, *optional*): Source of randomness.
        mask_ratios (`torch.FloatTensor` of shape `(num_images,)`, *optional*): In place of drawn ones.

    Returns:
        `torch.BoolTensor` of shape `(num_images, num_latents)`: True where a latent is hidden.
    """
    ratios = sample_mask_ratios(num_images, minimum, generator) if mask_ratios is None else mask_ratios
    num_hidden = (ratios * num_latents).ceil().long().clamp(1, num_latents)
    ranks = torch.rand(num_images, num_latents, generator=generator, device=ratios.device).argsort(-1).argsort(-1)
    return ranks < num_hidden[:, None]


def tokens_per_step(num_hidden: int, num_ar_steps: int) -> list[int]:
    r"""
    How many latents each autoregressive step generates: MAR's cosine schedule, at least one each.

    After step s, floor(n cos(pi / 2 (s + 1) / S)) of the n latents stay hidden.

    Args:
        num_hidden (`int`): n, latents to generate.
        num_ar_steps (`int`): S.

    Returns:
        `list[int]` of length `num_ar_steps` that sums to `num_hidden`.

    Raises:
        ValueError: If `num_ar_steps` is not between 1 and `num_hidden`.
    """
    if not 1 <= num_ar_steps <= num_hidden:
        raise ValueError(
            f"`num_ar_steps` must be between 1 and {num_hidden}, the number of hidden latents; got {num_ar_steps}."
        )
    counts, hidden = [], num_hidden
    for step in range(num_ar_steps):
        remaining = num_ar_steps - step - 1
        target = math.floor(num_hidden * math.cos(math.pi / 2 * (step + 1) / num_ar_steps))
        # At least one now, and at least one left for each later step.
        target = max(min(target, hidden - 1), remaining)
        counts.append(hidden - target)
        hidden = target
    return counts

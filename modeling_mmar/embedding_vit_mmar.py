"""PostProjector, EmbeddingViT and VisProjector: from known latent tokens to the LLM's width (Sec. 3.3.1, 3.3.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mmar import MMARConfig, MMARViTConfig


class MMARViTLinear(nn.Linear):
    """A linear that starts with Xavier's weights and zero biases, whatever its width (MAR)."""


class MMARMLPProjector(nn.Module):
    """`num_layers` linears with GELU between them; PostProjector has 2, VisProjector 3 (suppl. Sec. 6.1)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int):
        super().__init__()
        widths = [in_features] + [hidden_features] * (num_layers - 1) + [out_features]
        self.layers = nn.ModuleList(MMARViTLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden_states = F.gelu(layer(hidden_states))
        return self.layers[-1](hidden_states)


class MMARViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer encoder layer (ViT, arXiv 2010.11929)."""

    def __init__(self, config: MMARViTConfig):
        super().__init__()
        width = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = MMARViTLinear(width, 3 * width)
        self.out = MMARViTLinear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MMARMLPProjector(width, int(width * config.mlp_ratio), width, num_layers=2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, length, width = hidden_states.shape
        qkv = self.qkv(self.attention_norm(hidden_states)).view(batch, length, 3, self.num_attention_heads, -1)
        # (B, K, 3, heads, head_dim) -> 3 x (B, heads, K, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = hidden_states + self.out(attention.transpose(1, 2).reshape(batch, length, width))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class MMAREmbeddingViT(nn.Module):
    """
    ViT over the known image tokens only; it never sees how many latents are hidden, nor what they hold (Sec. 3.3.1).
    """

    def __init__(self, config: MMARConfig):
        super().__init__()
        vit = config.vit_config
        self.position_embedding = nn.Parameter(torch.zeros(config.num_latents, vit.hidden_size))
        self.layers = nn.ModuleList(MMARViTLayer(vit) for _ in range(vit.num_hidden_layers))
        self.norm = nn.LayerNorm(vit.hidden_size, eps=vit.layer_norm_eps)

    def forward(self, embeddings: Tensor, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        r"""
        Args:
            embeddings (`torch.FloatTensor` of shape `(I, K, D_vit)`): Projected known tokens, in any order.
            positions (`torch.LongTensor` of shape `(I, K)`): Their places on the picture, row by row.
            valid (`torch.BoolTensor` of shape `(I, K)`, *optional*): True where a slot holds a token; the others pad
                pictures with fewer known tokens and are never attended to.

        Returns:
            `torch.FloatTensor` of shape `(I, K, D_vit)`.
        """
        hidden_states = embeddings + self.position_embedding[positions]
        attention_mask = None
        if valid is not None:
            # A padding slot attends to itself, so that no row of the softmax is empty.
            itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
            attention_mask = (valid[:, None, :] | itself)[:, None]  # (I, 1, K, K)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.norm(hidden_states)


class MMARLatentEncoder(nn.Module):
    """
    Latent tokens and a mask of the hidden ones -> one embedding of the LLM's width per latent (Fig. 2).

    Known tokens pass PostProjector and EmbeddingViT, are put back beside the learned mask tokens, get the position
    embedding of their place, and pass VisProjector.
    """

    def __init__(self, config: MMARConfig):
        super().__init__()
        width = config.vit_config.hidden_size
        self.post_projector = MMARMLPProjector(config.latent_channels, width, width, num_layers=2)
        self.embedding_vit = MMAREmbeddingViT(config)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(config.num_latents, width))
        llm_width = config.text_config.hidden_size
        self.vis_projector = MMARMLPProjector(width, llm_width, llm_width, num_layers=3)

    def forward(
        self,
        latent_tokens: Tensor,
        latent_mask: Tensor | None = None,
        num_known: int | tuple[int, int] | None = None,
    ) -> Tensor:
        r"""
        Args:
            latent_tokens (`torch.FloatTensor` of shape `(I, N, C)`): Clean tokens; hidden ones are never read.
            latent_mask (`torch.BoolTensor` of shape `(I, N)`, *optional*): True where a latent is hidden. Without it
                every latent is known, as in understanding.
            num_known (`int` or `tuple[int, int]`, *optional*): How many the mask leaves known in every image, or the
                least and the most of any: where they are given, the device is not asked for them.

        Returns:
            `torch.FloatTensor` of shape `(I, N, D)`.
        """
        dtype = self.mask_token.dtype
        num_images, num_latents, channels = latent_tokens.shape
        if latent_mask is None:
            positions = torch.arange(num_latents, device=latent_tokens.device).expand(num_images, -1)
            embeddings = self.embedding_vit(self.post_projector(latent_tokens.to(dtype)), positions)
            return self.vis_projector(embeddings + self.position_embedding)
        if num_known is None:
            num_known = tuple(torch.stack((~latent_mask).sum(-1).aminmax()).tolist())
        least, most = (num_known, num_known) if isinstance(num_known, int) else num_known
        embeddings = self.mask_token.expand(num_images, num_latents, -1)
        # In training one slot at least, so that every rank runs the ViT.
        if most > 0 or self.training:
            width = max(most, 1)
            # Known places first, in order. (I, N) -> (I, K)
            positions = latent_mask.long().argsort(dim=-1, stable=True)[:, :width]
            tokens, valid = latent_tokens.gather(1, positions[..., None].expand(-1, -1, channels)), None
            if least < width:
                valid = torch.arange(width, device=positions.device) < (~latent_mask).sum(-1)[:, None]
                # Slots of padding must not read hidden latents, not even NaN.
                tokens = tokens.masked_fill(~valid[..., None], 0.0)
            known = self.embedding_vit(self.post_projector(tokens.to(dtype)), positions, valid)
            embeddings = embeddings.to(known.dtype)
            if valid is not None:
                known = torch.where(valid[..., None], known, self.mask_token.to(known.dtype))
            embeddings = embeddings.scatter(1, positions[..., None].expand_as(known), known)
        return self.vis_projector(embeddings + self.position_embedding)

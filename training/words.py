"""
What a picture shows and its style as words, which MMAR's latent encoder learns to tell from latents.

A toy MMAR has no pretrained encoder and sees a few thousand pictures, of which it learns too little from captions
alone. Words are a denser target (Joulin et al., "Learning visual features from large weakly supervised data", arXiv
1511.02251): `train_vae` teaches them beside the autoencoder, `train_latent_encoder` from cached latents.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_mmar.embedding_vit_mmar import MMARLatentEncoder


# Answers that hang on these have words to learn.
WORD_KINDS = ("content", "style")


def words_of(row: dict[str, Any], kind: str) -> tuple[str, ...]:
    """The words of a row's answers that hang on `kind`, in the alphabet's order."""
    pairs = zip(row.get("answers") or (), row.get("depends_on") or (), strict=False)
    return tuple(sorted({w for answer, own in pairs if own == kind for w in re.findall(r"\w+", answer.lower())}))


class Words:
    """
    The words of the training rows' answers of one kind, as distributions that a softmax learns.

    Args:
        rows (`list[dict]`): With `answers` and `depends_on`.
        kind (`str`): Of `WORD_KINDS`.
    """

    def __init__(self, rows: list[dict[str, Any]], kind: str):
        own = [words_of(row, kind) for row in rows]
        self.answers = sorted(set(own) - {()})
        self.vocabulary = {word: i for i, word in enumerate(sorted({w for answer in self.answers for w in answer}))}
        # (A + 1, V): equal shares of an answer's words; the last row is for rows without an answer.
        self._table = torch.zeros(len(self.answers) + 1, len(self.vocabulary))
        for line, answer in zip(self._table, self.answers, strict=False):
            line[[self.vocabulary[word] for word in answer]] = 1 / len(answer)
        numbers = {answer: i for i, answer in enumerate(self.answers)}
        self._row_answers = torch.tensor([numbers.get(answer, len(self.answers)) for answer in own])

    def loss(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Cross entropy in nats of logits `(B, V)` for training rows `(B,)`, mean over those that have an answer."""
        targets = self._table[self._row_answers[indices]].to(logits.device)
        num_rows = int((targets.sum(-1) > 0).sum())
        return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, num_rows)

    def best(self, logits: Tensor) -> list[tuple[str, ...]]:
        """The answers whose words are nearest to each of the logits `(B, V)`, by Kullback-Leibler divergence."""
        table = self._table[:-1]
        entropies = torch.special.entr(table).sum(-1)
        scores = F.log_softmax(logits.float().cpu(), -1) @ table.T + entropies
        return [self.answers[i] for i in scores.argmax(-1).tolist()]


class WordReader(nn.Module):
    """
    Tells words from latents: MMAR's latent encoder, the mean over its tokens, a linear per kind.

    Args:
        encoder (`MMARLatentEncoder`): Reads latents of mean 0 and std 1 per channel.
        width (`int`): The LLM's.
        words (`dict[str, Words]`): Per kind.
        norm (`nn.Module`, *optional*): Gives the latents that mean and std, if they have others.
    """

    def __init__(self, encoder: MMARLatentEncoder, width: int, words: dict[str, Words], norm: nn.Module | None = None):
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.encoder = encoder
        self.heads = nn.ModuleDict({kind: nn.Linear(width, len(own.vocabulary)) for kind, own in words.items()})

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents `(B, C, h, w)` -> logits `(B, V)` per kind."""
        tokens = self.norm(latents).flatten(2).transpose(1, 2)  # (B, N, C)
        pooled = self.encoder(tokens).mean(1)
        return {kind: head(pooled) for kind, head in self.heads.items()}


def known_words(rows: list[dict[str, Any]]) -> dict[str, Words]:
    """The words of training rows, per kind of which there are any."""
    words = {kind: Words(rows, kind) for kind in WORD_KINDS}
    return {kind: own for kind, own in words.items() if own.answers}


@torch.no_grad()
def share_told(
    reader: WordReader, latents: Iterable[Tensor], rows: list[dict[str, Any]], words: dict[str, Words]
) -> dict[str, float]:
    r"""
    Args:
        reader (`WordReader`): In evaluation mode.
        latents (`Iterable[torch.Tensor]`): Of the rows, in batches `(B, C, h, w)`.
        rows (`list[dict]`): With `answers` and `depends_on`.
        words (`dict[str, Words]`): Of the training rows.

    Returns:
        `dict[str, float]`: Share of rows per kind whose answer is told, among the answers of the training rows; rows
        with other answers do not count.
    """
    hits: dict[str, list[bool]] = {kind: [] for kind in words}
    start = 0
    for batch in latents:
        logits = reader(batch)
        for kind, own in words.items():
            expected = [words_of(row, kind) for row in rows[start : start + len(batch)]]
            told = zip(own.best(logits[kind]), expected, strict=True)
            hits[kind] += [best == answer for best, answer in told if answer in own.answers]
        start += len(batch)
    return {kind: sum(own) / len(own) for kind, own in hits.items() if own}

"""Answers and log-likelihoods of chats in batches: what the adapters of evaluation kits share. Needs no kit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature

from ..conversion.models import default_device, default_dtype
from ..modeling_mmar.configuration_mmar import shorten, shorten_names
from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.processing_mmar import MMARProcessor
from ..training.fingerprint import fingerprint


# Tokens of an answer, where neither the caller nor the model's generation_config says how many.
MAX_NEW_TOKENS = 512
SAMPLING = ("temperature", "top_p", "top_k")
# Of each weight tensor, for `fingerprint`.
NUM_HASHED_VALUES = 64


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    r"""
    Arguments of `generate` as evaluation kits mean them: greedy, unless a temperature above 0 is asked for.

    Args:
        options (`dict[str, Any]`): Arguments of `GenerationMixin.generate`; None stands for "not given".

    Returns:
        `dict[str, Any]`: A new dict, with `do_sample`.

    Raises:
        ValueError: If an argument is none of `GenerationConfig`, or asks for several answers to a chat.
    """
    if unknown := sorted(set(options) - set(vars(GenerationConfig()))):
        raise ValueError(
            f"expected arguments of transformers' `GenerationConfig`, such as `max_new_tokens`; got "
            f"{shorten_names(unknown)}. Drop or rename them."
        )
    options = {name: value for name, value in options.items() if value is not None}
    if (number := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"`num_return_sequences` must be 1, since kits take one answer; got {shorten(number)}.")
    options.setdefault("do_sample", "temperature" in options)
    if options.get("temperature") == 0:
        options["do_sample"] = False
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    return options


class MMARAnswerer:
    r"""
    An MMAR that answers chats in batches, and tells how likely it finds an answer.

    A chat is a list of messages as `MMARProcessor.apply_chat_template` takes them. Marks of pictures and control
    tokens in its texts are read as text.

    Args:
        model (`MMARForConditionalGeneration`): The model, in eval mode.
        processor (`MMARProcessor`): Its processor.
        batch_size (`int`, *optional*, defaults to 8): Chats that run together. Answers do not depend on it, up to
            rounding.

    Raises:
        ValueError: If `batch_size` is below 1, or model and processor do not fit together.

    Example:

    ```python
    >>> from PIL import Image

    >>> answerer = MMARAnswerer.from_pretrained("checkpoints/mmar-tiny")
    >>> content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "What is it?"}]
    >>> answers = answerer.answer([[{"role": "user", "content": content}]])
    ```
    """

    def __init__(self, model: PreTrainedModel, processor: MMARProcessor, batch_size: int = 8):
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1; got {shorten(batch_size)}.")
        MMARPipeline(model, processor, model.default_scheduler())  # checks that they fit together
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 8,
    ) -> "MMARAnswerer":
        r"""
        Loads model and processor from one folder or Hub repository.

        Args:
            name (`str`): Folder or Hub id.
            device (`str` or `torch.device`, *optional*): Where the model runs; the accelerator if there is one.
            dtype (`str` or `torch.dtype`, *optional*): Of the weights; `"auto"` is as saved. float32 on a CPU by
                default, as saved elsewhere.
            batch_size (`int`, *optional*, defaults to 8): Chats that run together.

        Returns:
            `MMARAnswerer`

        Raises:
            ValueError: If there is no MMAR, its tokenizer is missing, or `device` or `dtype` are none that torch has.
        """
        device = default_device() if device is None else device
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be 'auto' or a type of torch, such as 'bfloat16'; got {shorten(dtype)}.")
        try:
            torch.empty(0, device=device)
        # AssertionError: torch was built without it.
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` must be one that torch has here, such as 'cpu'; got {shorten(str(device))} "
                f"({shorten(error)})."
            ) from error
        dtype = default_dtype(device) or "auto" if dtype is None else dtype
        try:
            processor = MMARProcessor.from_pretrained(name)
        # Whatever the parts raise where a file is missing or of another model.
        except Exception as error:
            raise ValueError(
                f"expected an MMAR with processor_config.json, chat template and tokenizer in {shorten(str(name))}; "
                f"got {type(error).__name__}: {shorten(error)} Name a folder or repository that "
                "`MMARPipeline.save_pretrained` or `mmar export` wrote."
            ) from error
        model = AutoModel.from_pretrained(name, dtype=dtype)
        if not hasattr(model, "default_scheduler"):
            raise ValueError(f"expected an MMAR in {shorten(str(name))}; got a {type(model).__name__}. Name another.")
        return cls(model.to(device), processor, batch_size)

    def fingerprint(self) -> str:
        """Hash of a few values of each weight: tells one training of a model from another."""
        few = {name: weight.flatten()[:NUM_HASHED_VALUES] for name, weight in self.model.named_parameters()}
        return fingerprint(self.model.config.to_diff_dict(), few)[:16]

    def features(self, chats: Sequence[list[dict[str, Any]]]) -> BatchFeature:
        r"""
        Model inputs of chats up to the beginning of the answer.

        Args:
            chats (`Sequence[list[dict]]`): Chats.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (0 at padding) of shape `(B, L)`, padded on the left,
            and, if there are pictures, `pixel_values` `(I, 3, H, W)`, on the model's device.

        Raises:
            ValueError: If a chat is not built as it should be, a picture cannot be read, or a chat is too long.
        """
        features = self.processor.apply_chat_template(
            list(chats),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
        )
        return features.to(self.model.device)

    @torch.no_grad()
    def answer(self, chats: Sequence[list[dict[str, Any]]], until: Sequence[str] = (), **options: Any) -> list[str]:
        r"""
        Answers chats.

        Args:
            chats (`Sequence[list[dict]]`): Chats that end with a turn of the user.
            until (`Sequence[str]`, *optional*): An answer ends before the first of these strings.
            **options: Arguments of `GenerationMixin.generate`; see `generation_options`. By default greedy, with the
                `max_new_tokens` of the model's generation_config, or 512.

        Returns:
            `list[str]`: One answer per chat, without white space around it.

        Raises:
            ValueError: As `features` and `generation_options` raise, or if there is no room for `max_new_tokens`.
        """
        options = generation_options(options)
        if self.model.generation_config.max_new_tokens is None and "max_length" not in options:
            options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        until = [stop for stop in until if stop]
        if until:
            options |= {"stop_strings": until, "tokenizer": self.processor.tokenizer}
        answers = []
        for start in range(0, len(chats), self.batch_size):
            inputs = self.features(chats[start : start + self.batch_size])
            generated = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(generated, skip_special_tokens=True)
        for stop in until:
            answers = [answer.split(stop)[0] for answer in answers]
        return [answer.strip() for answer in answers]

    @torch.no_grad()
    def log_likelihoods(
        self, chats: Sequence[list[dict[str, Any]]], continuations: Sequence[str]
    ) -> list[tuple[float, bool]]:
        r"""
        Log-probability of each continuation as the beginning of the answer to its chat.

        The continuation is tokenized apart from the chat, as answers are in training, and taken as it is: a space
        before its first word counts. Marks of pictures and control tokens in it are read as text.

        Args:
            chats (`Sequence[list[dict]]`): Chats that end with a turn of the user.
            continuations (`Sequence[str]`): One per chat.

        Returns:
            `list[tuple[float, bool]]`: Sum over tokens of the log-probability, in nats; and whether each of the tokens
            is the likeliest one that is ever written, so that greedy decoding would begin with the continuation.

        Raises:
            ValueError: As `features` raises; if a continuation is empty, or they are not as many as chats.
        """
        if len(chats) != len(continuations):
            raise ValueError(f"expected one continuation per chat; got {len(continuations)} for {len(chats)} chats.")
        results = []
        for start in range(0, len(chats), self.batch_size):
            stop = start + self.batch_size
            results += self._log_likelihoods(chats[start:stop], continuations[start:stop])
        return results

    def _log_likelihoods(self, chats: Sequence[list[dict]], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """`log_likelihoods` of one batch."""
        rows, targets, pictures = [], [], []
        for chat, continuation in zip(chats, continuations, strict=True):
            target = self.processor.text_ids(continuation)
            if not target:
                raise ValueError(f"a continuation must have at least one token; got {shorten(continuation)}.")
            inputs = self.features([chat])
            rows.append(inputs["input_ids"][0].tolist() + target)
            targets.append(target)
            if "pixel_values" in inputs:
                pictures.append(inputs["pixel_values"])
        inputs = self.processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        # Padding is on the left, so the last positions predict the continuations.
        num_kept = max(map(len, targets)) + 1
        logits = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=torch.cat(pictures) if pictures else None,
            logits_to_keep=num_kept,
            use_cache=False,
            return_dict=True,
        ).logits
        # (B, num_kept, V), of which the last position predicts what is not there.
        log_probs = logits[:, :-1].float().log_softmax(-1)
        image_token_id = self.processor.image_token_id
        return [_score(log_probs[row, -len(target) :], target, image_token_id) for row, target in enumerate(targets)]


def _score(log_probs: Tensor, target: list[int], image_token_id: int) -> tuple[float, bool]:
    """Sum of the target's log-probabilities among `(T, V)`, and whether greedy decoding would write it."""
    ids = torch.tensor(target, device=log_probs.device)
    chosen = log_probs.gather(1, ids[:, None])
    # `generate` never writes the image token, however likely it is.
    written = log_probs.index_fill(1, ids.new_tensor([image_token_id]), -torch.inf).argmax(-1)
    return chosen.double().sum().item(), bool((written == ids).all())

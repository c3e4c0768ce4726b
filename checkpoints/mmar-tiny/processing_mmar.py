"""Processor of MMAR: text, chats and pictures to model inputs, and model outputs back to text and pictures."""

import inspect
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from PIL import Image
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import mark_control_tokens

from .configuration_mmar import IGNORE_INDEX, shorten
from .saving_mmar import pushing
from .image_processing_mmar import MMARImageProcessor, MMARImageProcessorKwargs


AUTO_MAP = {"AutoProcessor": "processing_mmar.MMARProcessor"}
IMAGE_TOKEN = "<|image|>"
# Text by which a chat template shows that it writes the user's text.
TEMPLATE_PROBE = "a red square"
# LLaVA's mark, read as the image token.
IMAGE_TOKEN_ALIAS = "<image>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# What transformers' `mark_control_tokens` sets around a control token that is plain text.
MARK_START, MARK_END = mark_control_tokens("x", re.compile("x")).split("x")
MARKED = re.compile(f"{MARK_START}.*?{MARK_END}", flags=re.DOTALL)
TASKS = ("t2i", "i2t", "uncond")
# How a tokenizer was loaded; transformers would write it into tokenizer_config.json. The last holds the named tokens,
# which stand there by their names.
LOADING_KWARGS = ("is_local", "local_files_only", "model_specific_special_tokens")

# Where and how to download; other arguments that are not the image processor's are the tokenizer's.
DOWNLOAD_NAMES = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_auth_token",
}

# ChatML as Qwen2 writes it, without its default system message, with pictures. `generation` marks assistant tokens.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'image' -%}
{{- '<|image|>' -}}
{%- if loop.nextitem is defined and loop.nextitem['type'] == 'text' -%}{{- '\\n' -}}{%- endif -%}
{%- elif item['type'] == 'text' -%}
{{- item['text'] -}}
{%- else -%}
{{- raise_exception("MMAR reads content of type 'text' and 'image'; got '" ~ item['type'] ~ "'.") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


class MMARProcessor(ProcessorMixin):
    r"""
    Wraps `MMARImageProcessor` and a tokenizer with ChatML tokens (Qwen2's, or a small one of one's own).

    A picture is marked in text by `image_token` or, as LLaVA does, by `<image>`; each mark is expanded to
    `num_image_tokens` copies of the image token. Chats hold pictures as `{"type": "image", "url": ...}`, and need no
    marks.

    The tokenizer is made to agree with the processor: `image_token` is added as one special token if it is not there,
    padding goes to the left, and its chat template is replaced by the processor's, since a text-only template such as
    Qwen2's cannot render pictures.

    Args:
        image_processor (`MMARImageProcessor`, *optional*): Defaults to `MMARImageProcessor()`, 256 x 256 pixels.
        tokenizer (`PreTrainedTokenizerBase`): Required.
        chat_template (`str` or `dict`, *optional*): Jinja template; defaults to `CHAT_TEMPLATE`.
        num_image_tokens (`int`, *optional*, defaults to 256): N, tokens of one picture.
        image_token (`str`, *optional*, defaults to `"<|image|>"`): Mark and placeholder of a picture.
        generation_prompt (`str`, *optional*, defaults to `"Generate an image: {caption}"`): User turn of text to
            image.
        null_prompt (`str`, *optional*, defaults to `"Generate an image:"`): User turn without a caption, for
            unconditional pictures and as the null of classifier-free guidance.

    Raises:
        ValueError: If the tokenizer is missing or lacks the ChatML tokens of the default template, if
            `generation_prompt` has no `{caption}`, or if `num_image_tokens` is below 1.

    Example:

    ```python
    >>> processor = MMARProcessor(tokenizer=AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct"))
    >>> content = [{"type": "image", "url": "cat.png"}, {"type": "text", "text": "What is it?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     tokenize=True,
    ...     return_dict=True,
    ...     add_generation_prompt=True,
    ...     return_tensors="pt",
    ... )
    >>> inputs.pixel_values.shape
    torch.Size([1, 3, 256, 256])
    ```
    """

    # Rows of a batch differ in length; `padding=False` turns this off.
    text_kwargs = {"padding": True}
    return_mm_token_type_ids = True
    output_modalities = ("image", "text")

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_image_tokens=256,
        image_token=IMAGE_TOKEN,
        generation_prompt="Generate an image: {caption}",
        null_prompt="Generate an image:",
        **kwargs,
    ):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"MMARProcessor needs a `tokenizer`; got {shorten(tokenizer)}. Pass "
                "AutoTokenizer.from_pretrained(...)."
            )
        if type(num_image_tokens) is not int or num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be an integer of at least 1; got {shorten(num_image_tokens)}.")
        if "{caption}" not in generation_prompt:
            raise ValueError(f"`generation_prompt` must contain '{{caption}}'; got {shorten(generation_prompt)}.")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.generation_prompt = generation_prompt
        self.null_prompt = null_prompt

        default_template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, image_token)
        chat_template = default_template if chat_template is None else chat_template
        if chat_template == default_template:
            missing = {TURN_START, TURN_END} - set(tokenizer.get_added_vocab())
            if missing:
                raise ValueError(
                    f"The tokenizer must have the special tokens {TURN_START} and {TURN_END} of the chat template; "
                    f"{', '.join(sorted(missing))} missing. Add them, or pass a `chat_template` of your own."
                )
        if image_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        # By the name that other processors and tools ask for; it is saved with the tokenizer.
        if "image_token" not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "image_token"]
        tokenizer.image_token = image_token
        # A text that is too long is refused here, and an image takes one position; transformers would warn by tokens.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"  # saved, for those who open the tokenizer alone
        tokenizer.chat_template = chat_template
        for name in LOADING_KWARGS:
            tokenizer.init_kwargs.pop(name, None)
        image_processor = MMARImageProcessor() if image_processor is None else image_processor
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if TEMPLATE_PROBE not in self.apply_chat_template([{"role": "user", "content": TEMPLATE_PROBE}]):
            raise ValueError(
                "`chat_template` must write the user's text; got one that leaves it out, so that all prompts would "
                "give the same image. Copy chat_template.jinja again."
            )

    @property
    def image_token_id(self) -> int:
        """Id of `image_token`."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return super().model_input_names + ["mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        """What some tokenizers return and the model does not take."""
        return ["token_type_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Prepares text with pictures.

        Args:
            images (*optional*): One picture, a list, or one list per text; see `MMARImageProcessor` for what a picture
                may be. A flat list is given to the marks in order of occurrence; a list with None has one entry per
                text, None where it has no picture.
            text (`str` or `list[str]`, *optional*): Text with one `image_token` or `<image>` per picture.
            videos, audio: Not supported; part of the signature of transformers' processors.
            **kwargs: Arguments of the tokenizer and of `MMARImageProcessor`, such as `return_tensors`, `padding`
                (defaults to `True`), `padding_side` (defaults to `"left"`), `size`.

        Returns:
            `BatchFeature` with, if there is text, `input_ids`, `attention_mask` (0 at padding) and
            `mm_token_type_ids` (1 at image tokens, else 0), each of shape `(B, L)`, and, if there are pictures,
            `pixel_values` of shape `(num_images, 3, H, W)`, float32 in [-1, 1], in order of occurrence.

        Raises:
            ValueError: If there is neither text nor picture, if marks and pictures differ in number, if a row is
                longer than `tokenizer.model_max_length`, if truncation would cut into a picture, or if a picture is
                bad.
        """
        if isinstance(images, (list, tuple)):
            if any(entry is None for entry in images):
                # One entry per text, None where there is no picture: never shifted to the next mark.
                images = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
                images = [[] if entry == [None] else entry for entry in images]
            if not self.image_processor.flatten_images(images):
                images = None  # no picture in any row
        features = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if "input_ids" in features:
            for row, length in enumerate(self._row_lengths(features)):
                self._check_length(length, f"Text {row}")
        return features

    def _row_lengths(self, features: BatchFeature) -> list[int]:
        """Positions of each row without padding: one per token of text, one per picture (Sec. 3.3.2)."""
        lengths = []
        for row, ids in enumerate(features["input_ids"]):
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            num_tokens = int(sum(features["attention_mask"][row])) if "attention_mask" in features else len(ids)
            num_pictures = ids.count(self.image_token_id) // self.num_image_tokens
            lengths.append(num_tokens - num_pictures * (self.num_image_tokens - 1))
        return lengths

    def _check_length(self, length: int, name: str):
        """Refuses what is longer than the model's positions; nothing is ever cut silently."""
        if length > self.tokenizer.model_max_length:
            raise ValueError(
                f"{name} must have at most {self.tokenizer.model_max_length} positions (`tokenizer.model_max_length`),"
                f" one per token of text and one per picture; got {length}. Shorten it."
            )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Opens picture files, makes text a list and `<image>` the image token. Called by `__call__`."""
        if videos is not None or audio is not None:
            raise ValueError("MMAR reads text and pictures; got videos or audio. Drop them.")
        if isinstance(text, str):
            text = [text]
        if text is not None and (not isinstance(text, (list, tuple)) or len(text) == 0):
            got = "an empty list" if isinstance(text, (list, tuple)) else type(text).__name__
            raise ValueError(f"`text` must be a string or a list of at least one string; got {got}.")
        # Sanitized text is the user's own: only the template may place pictures then.
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            text = [t.replace(IMAGE_TOKEN_ALIAS, self.image_token) if isinstance(t, str) else t for t in text]
        elif text is not None:
            text = list(text)
        if images is not None:
            images = self.image_processor.fetch_images(images)
        return images, text, None, None

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that each row has as many marks as pictures. Called by `__call__`."""
        if images is None and text is None:
            raise ValueError("MMARProcessor needs `text` or `images`; got neither.")
        if text is None:
            return
        for row, sample in enumerate(text):
            if not isinstance(sample, str):
                raise ValueError(
                    f"`text` must be a string or a list of strings; row {row} is {type(sample).__name__}."
                )
            _check_unicode(sample, f"Text {row}")

        num_marks = [sample.count(self.image_token) for sample in text]
        flatten = self.image_processor.flatten_images
        if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
            num_images = [len(flatten(entry)) for entry in images]
            if len(num_images) != len(text):
                raise ValueError(
                    f"Lists of pictures must be as many as texts; got {len(num_images)} lists for {len(text)} texts. "
                    "Pass one list per text, empty where a text has no picture."
                )
        elif images is None or len(text) == 1:
            num_images = [len(flatten(images))] + [0] * (len(text) - 1)
        else:
            total = len(flatten(images))
            if sum(num_marks) != total:
                raise ValueError(
                    f"Texts must have as many image marks ({self.image_token} or {IMAGE_TOKEN_ALIAS}) as there are "
                    f"pictures; got {sum(num_marks)} marks ({shorten(num_marks)} by row) for {total} pictures. "
                    "Pass one list of pictures per text to see which row is wrong."
                )
            num_images = num_marks
        for row, (marks, pictures) in enumerate(zip(num_marks, num_images, strict=True)):
            if marks != pictures:
                raise ValueError(
                    f"Each text must have as many image marks ({self.image_token} or {IMAGE_TOKEN_ALIAS}) as "
                    f"pictures; row {row} has {marks} marks and {pictures} pictures. Add or drop one or the other."
                )

    def _process_images(self, images, **kwargs):
        """Pixels of all pictures, and what replaces each mark."""
        features = self.image_processor(images, **kwargs)
        num_images = len(features["pixel_values"])
        return features, [self.replace_image_token(features, index) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Text that stands for one picture: `num_image_tokens` image tokens."""
        return self.image_token * self.num_image_tokens

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        """Truncation must not cut into a picture."""
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities)
        except ValueError as error:
            raise ValueError(
                f"Truncation must keep pictures whole, {self.num_image_tokens} tokens each; the image tokens left in "
                f"each row (ids) are fewer than those needed (text): {shorten(error)} Raise `max_length`, drop "
                "`truncation`, or pass fewer pictures."
            ) from error

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Image tokens for pictures of the given sizes; serving engines ask for it."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    # Chats

    def apply_chat_template(self, conversation: list[dict] | list[list[dict]], *args, **kwargs):
        r"""
        Renders chats and, with `tokenize=True`, makes model inputs; see `ProcessorMixin.apply_chat_template`.

        A picture is an item `{"type": "image"}` and nothing else. When a chat is tokenized, control tokens and image
        marks in its texts are plain text, so that a user's words cannot end a turn or place a picture. With
        `tokenize=False` the string comes unmarked: who tokenizes it cannot tell them from the template's own.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): One chat or several: messages with `role` and `content`,
                a string or a list of `{"type": "text", "text": ...}` and `{"type": "image", "url": ...}`.
            *args: Those of transformers.
            sanitize_control_tokens (`bool`, *optional*): False takes control tokens and marks in texts for what they
                are; True with `tokenize`, the default.
            **kwargs: Those of transformers.

        Returns:
            `str`, `list[str]` or, tokenized, `BatchFeature`.

        Raises:
            ValueError: If a chat is not built so, the message names the place; if `return_assistant_tokens_mask` is
                asked for and a text holds control tokens, which cannot be told from others in the mask.
        """
        _check_conversation(conversation)
        given = inspect.signature(super().apply_chat_template).bind(conversation, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        del given["conversation"]
        if not given.get("tokenize"):
            return super().apply_chat_template(conversation, **given)
        # The template has written what special tokens there are.
        given["processor_kwargs"] = {"add_special_tokens": False, **(given.get("processor_kwargs") or {})}
        if (sanitize := given.pop("sanitize_control_tokens", None)) is None or sanitize:
            template = self._resolve_chat_template(given.get("chat_template"))
            # Marks of the template itself are still its pictures.
            given["chat_template"] = template.replace(IMAGE_TOKEN_ALIAS, self.image_token)
            texts = [conversation, given.get("tools"), given.get("documents")]
            if _holds(texts, (*self._control_tokens(), IMAGE_TOKEN_ALIAS)):
                if given.get("return_assistant_tokens_mask"):
                    raise ValueError(
                        "With `return_assistant_tokens_mask` no text may hold a control token or image mark; got one. "
                        "Drop it, or pass `sanitize_control_tokens=False` to have it read as one."
                    )
                given["sanitize_control_tokens"] = True
        return super().apply_chat_template(conversation, **given)

    # Prompts of the tasks

    def _control_tokens(self) -> tuple[str, ...]:
        """Tokens that text of others must not place, the longest first."""
        templates = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template]
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or any(token.content in t for t in templates)}
        return tuple(sorted(tokens, key=len, reverse=True))

    def _plain(self, text: str, name: str) -> str:
        """Text of others, its control tokens wrapped in transformers' markers, by which they are read as text."""
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string; got {type(text).__name__}.")
        _check_unicode(text, name)
        return mark_control_tokens(text, re.compile("|".join(map(re.escape, self._control_tokens()))))

    def _encode(self, text: str | list[str], **kwargs: Any) -> BatchFeature:
        """Tokens of rendered text, in which `_plain` may have wrapped some."""
        if MARK_START in (text if isinstance(text, str) else "".join(text)):
            kwargs["sanitize_control_tokens"] = True
        return self.tokenizer(text, add_special_tokens=False, **kwargs)

    def text_ids(self, text: str) -> list[int]:
        r"""
        Tokens of a text in which control tokens and image marks are plain text, as in chats.

        Args:
            text (`str`): Any text.

        Returns:
            `list[int]`

        Raises:
            ValueError: If it is no string or no valid Unicode.
        """
        return self._encode(self._plain(text, "A text"))["input_ids"]

    def _expand(self, text: str) -> str:
        """Each image token of rendered text, unless it is plain text, as often as a picture has tokens."""
        count = len(MARKED.sub("", text).split(self.image_token)) - 1
        return self.get_text_with_replacements([text], [self.image_token * self.num_image_tokens] * count)[0][0]

    def _generation_text(self, prompt: str | None) -> str:
        """The text before a generated picture; the null prompt for None and ''."""
        prompt = "" if prompt is None else prompt
        prompt = self._plain(prompt, "A prompt")
        content = self.generation_prompt.replace("{caption}", prompt) if prompt else self.null_prompt
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def generation_inputs(
        self,
        prompts: str | None | list[str | None],
        negative_prompts: str | None | list[str | None] = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        r"""
        Text before the picture in text to image: the user turn and the beginning of the assistant turn.

        No image token is among it.

        Args:
            prompts (`list[str]`): Captions; None or `""` gives the null prompt, for an unconditional picture.
            negative_prompts (`str` or `list[str]`, *optional*): What guidance leads away from, one for all prompts or
                one each; None or `""` within a list gives the null prompt.
            return_tensors (`str`, *optional*, defaults to `"pt"`): As for tokenizers.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (0 at padding) of shape `(B, L)`, padded on the left;
            with `negative_prompts` also `negative_input_ids` and `negative_attention_mask`, of the same shape.

        Raises:
            ValueError: If a prompt is no string, if prompts are none, if the negative ones differ in number, or if a
                prompt with its picture is longer than `tokenizer.model_max_length`.
        """
        prompts = [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError(
                "`prompts` must hold at least one prompt; got none. Pass [''] for an unconditional picture."
            )
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        negative_prompts = [] if negative_prompts is None else list(negative_prompts)
        if negative_prompts and len(negative_prompts) != len(prompts):
            raise ValueError(
                f"`negative_prompts` must be one string or as many as `prompts`; got {len(negative_prompts)} for "
                f"{len(prompts)} prompts."
            )
        texts = [self._generation_text(prompt) for prompt in prompts + negative_prompts]
        features = self._encode(
            texts, padding=True, padding_side="left", return_attention_mask=True, return_tensors=return_tensors
        )
        for row, length in enumerate(self._row_lengths(features)):
            name = f"Prompt {row}" if row < len(prompts) else f"Negative prompt {row - len(prompts)}"
            self._check_length(length + 1, f"{name} with its picture")
        split = {}
        for name in ("input_ids", "attention_mask"):
            split[name] = features[name][: len(prompts)]
            if negative_prompts:
                split[f"negative_{name}"] = features[name][len(prompts) :]
        return BatchFeature(split)

    def training_example(
        self,
        task: str,
        text: str | None = None,
        question: str | None = "Describe the image.",
        num_images: int = 1,
    ) -> dict[str, list[int]]:
        r"""
        Tokens and labels of one training sample, unpadded.

        Args:
            task (`str`): `"t2i"`: the prefix of `generation_inputs`, then the picture. `"uncond"`: the same with the
                null prompt, `text` being ignored. `"i2t"`: pictures, newline and question in the user turn, the answer
                in the assistant turn.
            text (`str`, *optional*): The caption of `"t2i"`, the answer of `"i2t"`.
            question (`str`, *optional*, defaults to `"Describe the image."`): For `"i2t"`; None or `""` for pictures
                alone.
            num_images (`int`, *optional*, defaults to 1): Pictures of `"i2t"`; the other tasks have one.

        Returns:
            `dict` with `input_ids` and `labels`, lists of one length. Labels are -100 but for the answer and the
            `<|im_end|>` that closes it; `"t2i"` and `"uncond"` have none.

        Raises:
            ValueError: If `task` is unknown, a text is missing, `num_images` is below 1, or the sample is longer than
                `tokenizer.model_max_length`.
        """
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}; got {shorten(task)}.")
        if task != "uncond":
            plain = self._plain(text, f"`text` of task {task!r}")
            if not text:
                raise ValueError(
                    f"`text` of task {shorten(task)} must not be empty. Use task 'uncond' for no caption."
                )
        if task == "i2t":
            if num_images < 1:
                raise ValueError(f"`num_images` must be at least 1; got {num_images}.")
            content = [{"type": "image"}] * num_images
            if question:
                content = content + [{"type": "text", "text": self._plain(question, "`question`")}]
            prefix = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            prefix = self._expand(prefix)
            # Apart from the prefix, as in generation: no merge across the border.
            answer = self._encode(plain + TURN_END)["input_ids"]
        else:
            prefix = self._generation_text(text if task == "t2i" else None)
            prefix += self.image_token * self.num_image_tokens
            answer = []
        prefix = self._encode(prefix)["input_ids"]
        input_ids = prefix + answer
        self._check_length(self._row_lengths(BatchFeature({"input_ids": [input_ids]}))[0], "A training sample")
        return {"input_ids": input_ids, "labels": [IGNORE_INDEX] * len(prefix) + answer}

    def training_chat(self, messages: list[dict]) -> dict[str, list[int]]:
        r"""
        Tokens and labels of a chat, unpadded: every assistant turn is learned, the rest is given.

        Args:
            messages (`list[dict]`): As for `apply_chat_template`; a picture is `{"type": "image"}`, anything else in
                that item being ignored. Pictures stand in system and user turns.

        Returns:
            `dict` with `input_ids` and `labels`, lists of one length. Labels are -100 but for assistant turns and the
            `<|im_end|>` that closes each.

        Raises:
            ValueError: If the messages are not built so, no assistant turn has text, or the chat is longer than
                `tokenizer.model_max_length`.
        """
        _check_conversation(messages)
        input_ids, labels = [], []
        # Text before the next assistant turn's content; tokenized apart from it, as in generation.
        given = ""
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            items = [
                {"type": "text", "text": self._plain(item["text"], f"The text of message {index}")}
                if item["type"] == "text"
                else {"type": "image"}
                for item in items
            ]
            if role != "assistant":
                given += self.apply_chat_template([{"role": role, "content": items}])
                continue
            if any(item["type"] == "image" for item in items):
                raise ValueError(
                    f"A picture must stand in a turn of user or system; message {index} has one in the assistant's. "
                    "Task 't2i' of `training_example` teaches to draw."
                )
            answer = "".join(item["text"] for item in items)
            if not answer.strip():
                raise ValueError(
                    f"An assistant's turn must not be empty; message {index} is. Fill it or drop the chat."
                )
            given += f"{TURN_START}assistant\n"
            prefix = self._encode(self._expand(given))["input_ids"]
            learned = self._encode(answer + TURN_END)["input_ids"]
            input_ids += prefix + learned
            labels += [IGNORE_INDEX] * len(prefix) + learned
            given = "\n"
        if not labels:
            raise ValueError("A chat must have a turn of the assistant, which is learned; got none.")
        # What follows the last answer teaches nothing.
        self._check_length(self._row_lengths(BatchFeature({"input_ids": [input_ids]}))[0], "A training chat")
        return {"input_ids": input_ids, "labels": labels}

    # From outputs back

    def postprocess(self, pixel_values: torch.Tensor, output_type: str = "pil"):
        """Pictures from `pixel_values` in [-1, 1]; see `MMARImageProcessor.postprocess`."""
        return self.image_processor.postprocess(pixel_values, output_type=output_type)

    def post_process_image_text_to_text(
        self, generated_outputs: torch.Tensor | np.ndarray | list, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        r"""
        Decodes generated text.

        Args:
            generated_outputs (`torch.LongTensor` of shape `(B, L)` or `(L,)`): Token ids.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Drop special tokens, image tokens among them.
            **kwargs: Arguments of the tokenizer's `batch_decode`.

        Returns:
            `list[str]`: B texts; one for shape `(L,)`.
        """
        if getattr(generated_outputs, "ndim", None) == 1:
            generated_outputs = generated_outputs[None]
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs: Any, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        r"""
        Turns what `generate` returned into text or pictures.

        Args:
            generated_outputs (`torch.Tensor`): Token ids `(B, L)` for text, `pixel_values` `(B, 3, H, W)` in [-1, 1]
                for pictures.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): For text.
            generation_mode (`str`, *optional*): `"text"`, the default, or `"image"`.
            **kwargs: Arguments of `batch_decode` for text; `output_type` for pictures, the others being ignored.

        Returns:
            `list[str]` or `list[PIL.Image.Image]`.

        Raises:
            ValueError: If `generation_mode` is unknown or pictures are not finite.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        if generation_mode == "image":
            return self.postprocess(generated_outputs, output_type=kwargs.get("output_type", "pil"))
        raise ValueError(f"`generation_mode` must be 'text' or 'image'; got {shorten(generation_mode)}.")

    # Saving and loading

    def to_dict(self) -> dict[str, Any]:
        """Configuration as a dictionary, with the `auto_map` that lets transformers find this class on the Hub."""
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        r"""
        Writes processor_config.json (with the image processor in it), chat_template.jinja and the tokenizer's files.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Also upload, to `repo_id` or a repository of the
                folder's name.
            **kwargs: Arguments of `push_to_hub`.

        Returns:
            `list[str]`: Path of processor_config.json.
        """
        os.makedirs(save_directory, exist_ok=True)
        if self._auto_class is not None:
            # Loaded as remote code: the code travels along. The stock method would do it too, but would also write
            # our auto_map into tokenizer_config.json, so that saving twice would give different files.
            custom_object_save(self, save_directory)
            self._auto_class = None
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            # Left by the last call, set anew by the next; tokenizer.json must not depend on it.
            backend.no_padding()
            backend.no_truncation()
        try:
            files = super().save_pretrained(save_directory)
        finally:
            self.__dict__.pop("_auto_class", None)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload MMARProcessor", **kwargs: Any) -> CommitInfo:
        r"""
        Uploads what `save_pretrained` writes, as one commit. `MMARPipeline` uploads the whole folder, with the model.

        Args:
            repo_id (`str`): Repository, made if it does not exist.
            commit_message (`str`, *optional*): Title of the commit.
            **kwargs: `commit_description`, `private`, `token`, `revision` (a branch) and `create_pr`.

        Returns:
            `huggingface_hub.CommitInfo`

        Raises:
            ValueError: If there is no token that may write, the Hub cannot be reached, or the upload broke.
        """
        with pushing(repo_id, commit_message=commit_message, **kwargs) as push:
            self.save_pretrained(push.folder)
        return push.commit

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        """Loads both parts by class, so that remote code asks for trust only once."""
        kwargs.pop("trust_remote_code", None)
        # An override of the processor or of the image processor is none of the tokenizer's business: it would be
        # written into tokenizer_config.json.
        own_names = {"chat_template", "num_image_tokens", "image_token", "generation_prompt", "null_prompt"}
        kwargs = {name: value for name, value in kwargs.items() if name not in own_names}
        image_names = set(MMARImageProcessorKwargs.__annotations__)
        tokenizer_kwargs = {name: value for name, value in kwargs.items() if name not in image_names}
        # With an empty config the tokenizer's own files decide its class, and config.json is not opened.
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, config=PreTrainedConfig(), trust_remote_code=False, **tokenizer_kwargs
            )
        except Exception as error:  # tokenizers raises nothing narrower for a broken file
            if isinstance(error, OSError) or not os.path.isdir(pretrained_model_name_or_path):
                raise  # names what is missing
            raise ValueError(
                "expected whole tokenizer files (tokenizer.json, tokenizer_config.json) in "
                f"{shorten(str(pretrained_model_name_or_path))}; they cannot be read ({shorten(error)}). Copy or "
                "download them again."
            ) from error
        image_kwargs = {name: value for name, value in kwargs.items() if name in image_names | DOWNLOAD_NAMES}
        return [MMARImageProcessor.from_pretrained(pretrained_model_name_or_path, **image_kwargs), tokenizer]


def _holds(value: Any, marks: tuple[str, ...]) -> bool:
    """Whether a text in messages, tools or documents holds one of the marks; what stands for pictures is none."""
    if isinstance(value, str):
        return any(mark in value for mark in marks)
    if isinstance(value, dict):
        is_picture = value.get("type") in ("image", "image_url")
        return not is_picture and any(_holds(own, marks) for own in value.values())
    return isinstance(value, (list, tuple)) and any(_holds(own, marks) for own in value)


def _check_unicode(text: str, name: str) -> None:
    """Raises a `ValueError` for text with half a surrogate pair, as a file read in a wrong encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode; got a lone surrogate at {error.start}. Read its source as UTF-8."
        ) from error


def _check_conversation(conversation: Any) -> None:
    """Raises a `ValueError` that names the first message that is not one."""
    if not isinstance(conversation, (list, tuple)) or len(conversation) == 0:
        got = "an empty list" if isinstance(conversation, (list, tuple)) else type(conversation).__name__
        raise ValueError(
            'A chat must be a list of messages, {"role": "user", "content": ...}, or a list of such lists; '
            f"got {got}."
        )
    if isinstance(conversation[0], (list, tuple)):
        for chat in conversation:
            _check_conversation(chat)
        return
    for index, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(
                f"Message {index} must be a dict with `role`, a string, and `content`; got {shorten(message)}."
            )
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(
                f"The content of message {index} must be a string or a list of dicts; got {type(content).__name__}."
            )
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in (None, "text", "image", "image_url"):
                raise ValueError(
                    f"MMAR reads content of type 'text' and 'image'; got {shorten(kind)} in message {index}."
                )
            if kind is None or (kind == "text" and not isinstance(item.get("text"), str)):
                raise ValueError(
                    f'The content of message {index} must hold dicts such as {{"type": "text", "text": "..."}} and '
                    f'{{"type": "image", "url": "..."}}; got {shorten(item)}.'
                )


__all__ = ["MMARProcessor"]

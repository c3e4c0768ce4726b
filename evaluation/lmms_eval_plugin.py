"""
MMAR as a model of lmms-eval, which finds it through the entry point group `lmms_eval.models`.

    python -m lmms_eval --model mmar --model_args pretrained=MODEL --tasks pope --batch_size 8 --output_path runs/lmms

MODEL is a folder or Hub id. `mmar` serves every kind of task: answers, chats of several rounds, log-likelihoods and
multiple choice by them; pictures stand where the text says `<image>`, or before it. `mmar_chat` takes the tasks'
own messages, with pictures and texts in their order; it answers only.
"""

import inspect
from collections.abc import Callable, Iterator
from itertools import count, groupby
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..modeling_mmar.configuration_mmar import shorten
from ..processors.image_processing_mmar import read_image
from ..processors.processing_mmar import IMAGE_TOKEN_ALIAS
from .answers import MMARAnswerer, generation_options


try:
    from lmms_eval.api.instance import GenerationResult, Instance
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import ConfigurableTask
except ImportError as error:
    raise ImportError(
        f"lmms-eval cannot be imported: {shorten(error)}. Install it with `pip install lmms-eval` (see "
        "docs/evaluation.md), in a separate environment if its dependencies do not fit yours."
    ) from error


def manifests() -> list[Any]:
    """What lmms-eval's registry of models asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # its package asks for us while it is being imported

    return [
        ModelManifest(model_id="mmar", simple_class_path=f"{__name__}.MMARForLMMSEval"),
        ModelManifest(model_id="mmar_chat", chat_class_path=f"{__name__}.MMARChatForLMMSEval"),
    ]


class LogLikelihood(tuple, GenerationResult):
    """
    A number and whether decoding is greedy; lmms-eval 0.7.3 makes a text of a tuple that is not of its class.

    Its cache of responses (`--use_cache`) would read it back as a text too. It keeps no empty texts, and to it this is
    one: log-likelihoods are computed each time.
    """

    def __init__(self, pair: tuple[float, bool]):
        super().__init__(text=self)

    def strip(self) -> str:
        """What the cache asks of a text."""
        return ""


def takes_smallest() -> bool:
    """Whether lmms-eval takes for chosen the option of the smallest number: it expects losses in multiple choice."""
    return "argmin(lls)" in inspect.getsource(inspect.unwrap(ConfigurableTask.process_results))


def content_of(context: str, pictures: list[Any]) -> list[dict[str, Any]]:
    r"""
    Content of a chat's turn: pictures at the `<image>` marks of the text if there are as many, else before it.

    Args:
        context (`str`): The text.
        pictures (`list`): Images in whatever form `read_image` takes them. They come from the rows of a task, which
            may name no file and no URL.

    Returns:
        `list[dict]`

    Raises:
        ValueError: If an image is not here itself or cannot be read.
    """
    images = [{"type": "image", "image": read_image(picture, places=False)} for picture in pictures]
    texts = context.split(IMAGE_TOKEN_ALIAS)
    if not pictures or len(texts) != len(pictures) + 1:
        return images + [{"type": "text", "text": context}]
    content = [{"type": "text", "text": texts[0].rstrip("\n")}]
    for image, text in zip(images, texts[1:], strict=True):
        content += [image, {"type": "text", "text": text.lstrip("\n")}]
    return [item for item in content if item["type"] == "image" or item["text"]]


def options_of(task_options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    r"""
    A task's `generation_kwargs` as arguments of `generate`, and its stop strings.

    Args:
        task_options (`dict[str, Any]`): As the task's YAML file has them; those for other models are dropped.

    Returns:
        `tuple[dict[str, Any], list[str]]`
    """
    until = task_options.get("until") or []
    known = vars(GenerationConfig()).keys() - {"stop_strings"}
    options = {name: value for name, value in task_options.items() if name in known}
    if "max_gen_toks" in task_options:
        options.setdefault("max_new_tokens", task_options["max_gen_toks"])
    return generation_options(options), [until] if isinstance(until, str) else list(until)


class MMARForLMMSEval(lmms):
    r"""
    MMAR for tasks that give a text and pictures.

    Args:
        pretrained (`str`): Folder or Hub id.
        device (`str`, *optional*): Where it runs; the accelerator if there is one. Under `accelerate launch` each
            process has its own.
        batch_size (`int`, *optional*, defaults to 1): Requests that run together.
        dtype (`str`, *optional*): Of the weights; `"auto"` is as saved. float32 on a CPU by default, as saved
            elsewhere.
        max_batch_size (`int`, *optional*): Part of lmms-eval's signature; not used.

    Raises:
        ValueError: If there is no whole MMAR, or `batch_size` is no number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"--batch_size must be a number for MMAR; got {shorten(batch_size)}.")
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
        self.answerer = MMARAnswerer.from_pretrained(pretrained, device, dtype, int(batch_size))
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.losses_for_choices = takes_smallest()

    @property
    def batch_size(self) -> int:
        """Requests that run together."""
        return self.answerer.batch_size

    @property
    def device(self) -> torch.device:
        """Where the model runs; lmms-eval gathers there."""
        return self.answerer.model.device

    def document(self, task: str, split: str, doc_id: int) -> Any:
        """The row that a request is about."""
        return self.task_dict[task][split][doc_id]

    def _in_batches(
        self, requests: list[Instance], options_at: int
    ) -> Iterator[tuple[list[int], list[tuple], dict[str, Any], list[str]]]:
        """Positions and arguments of requests that have their generation_kwargs in common, batch by batch."""

        def key(position: int) -> str:
            return repr(sorted(requests[position].args[options_at].items(), key=lambda item: item[0]))

        for _, positions in groupby(sorted(range(len(requests)), key=key), key):
            positions = list(positions)
            options, until = options_of(requests[positions[0]].args[options_at])
            for start in range(0, len(positions), self.batch_size):
                batch = positions[start : start + self.batch_size]
                yield batch, [requests[position].args for position in batch], options, until

    def _answer_all(
        self, requests: list[Instance], options_at: int, chat_of: Callable[[tuple], list[dict[str, Any]]]
    ) -> list[str]:
        """Answers requests in batches and tells lmms-eval's cache."""
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="answering")
        for positions, arguments, options, until in self._in_batches(requests, options_at):
            texts = self.answerer.answer([chat_of(each) for each in arguments], until, **options)
            for position, each, text in zip(positions, arguments, texts, strict=True):
                answers[position] = text
                self.cache_hook.add_partial("generate_until", (each[0], each[options_at]), text)
            progress.update(len(positions))
        progress.close()
        return answers

    def _user_turn(self, context: str, pictures: list[Any] | None) -> dict[str, Any]:
        return {"role": "user", "content": content_of(context, list(pictures or []))}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        r"""
        Answers requests.

        Args:
            requests (`list[Instance]`): With context, generation_kwargs, pictures of a document, its id, task, split.

        Returns:
            `list[str]`: One answer per request, which ends before the first of the stop strings in `until`.
        """

        def chat_of(arguments: tuple) -> list[dict[str, Any]]:
            context, _, pictures_of, doc_id, task, split = arguments
            return [self._user_turn(context, pictures_of(self.document(task, split, doc_id)))]

        return self._answer_all(requests, 1, chat_of)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        r"""
        Answers requests in rounds: the task makes each round's question of the answers so far.

        Args:
            requests (`list[Instance]`): With context, generation_kwargs, pictures and text of a document, its id, task
                and split.

        Returns:
            `list[list[str]]`: The answers of all rounds, per request.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="answering in rounds"):
            context, task_options, pictures_of, text_of, doc_id, task, split = request.args
            document = self.document(task, split, doc_id)
            options, until = options_of(task_options)
            pictures, answers, info = pictures_of(document), [], None
            for round_idx in count(1):
                answers = [*answers, *self.answerer.answer([[self._user_turn(context, pictures)]], until, **options)]
                pictures, context, is_last, answers, info = text_of(
                    document, previous_output=answers, round_idx=round_idx, previous_round_info=info
                )
                if is_last:
                    break
            results.append(list(answers))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        r"""
        Log-probability of continuations, each the sum over its tokens.

        The options of a multiple-choice task are an exception, where lmms-eval chooses the smallest number (0.7.3
        does, and says that models return losses): there each number is minus the log-probability.

        Args:
            requests (`list[Instance]`): With context, continuation (or what makes it of a document), and, if there are
                pictures, pictures of a document, its id, task, split.

        Returns:
            `list[tuple[float, bool]]`: Per request that number, and whether greedy decoding would begin so.
        """
        chats, continuations, is_choice = [], [], []
        for request in requests:
            context, continuation, *rest = request.args
            pictures = None
            # A text comes from a multiple-choice task, a function from one of log-likelihoods.
            is_choice.append(isinstance(continuation, str) and bool(rest))
            if rest:
                pictures_of, doc_id, task, split = rest
                document = self.document(task, split, doc_id)
                pictures = pictures_of(document) if pictures_of is not None else None
                continuation = continuation if isinstance(continuation, str) else continuation(document)
            chats.append([self._user_turn(context, pictures)])
            continuations.append(str(continuation))
        scores = self.answerer.log_likelihoods(chats, continuations)
        scores = [
            LogLikelihood((-score if choice and self.losses_for_choices else score, is_greedy))
            for (score, is_greedy), choice in zip(scores, is_choice, strict=True)
        ]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args[:2], score)
        return scores


class MMARChatForLMMSEval(MMARForLMMSEval):
    """MMAR for tasks that give messages, with pictures and texts in any order; see `MMARForLMMSEval`."""

    is_simple = False

    def _chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """lmms-eval's messages as `MMARProcessor` reads them."""
        chat = []
        for message in messages:
            content = []
            for item in message["content"]:
                if item["type"] not in ("text", "image"):
                    raise ValueError(
                        f"MMAR reads texts and pictures; a task has {shorten(item['type'])}. Leave it out."
                    )
                if item["type"] == "text":
                    content.append({"type": "text", "text": item["text"]})
                else:
                    content.append({"type": "image", "image": read_image(item["url"], places=False)})
            chat.append({"role": message["role"], "content": content})
        return chat

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers requests, with context, messages of a document, generation_kwargs, its id, task, split."""

        def chat_of(arguments: tuple) -> list[dict[str, Any]]:
            _, messages_of, _, doc_id, task, split = arguments
            return self._chat(messages_of(self.document(task, split, doc_id)))

        return self._answer_all(requests, 2, chat_of)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers requests in rounds, until the task has no more messages."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="answering in rounds"):
            _, messages_of, task_options, doc_id, task, split = request.args
            document = self.document(task, split, doc_id)
            options, until = options_of(task_options)
            messages, answers, info = messages_of(document), [], None
            for round_idx in count(1):
                answers = [*answers, *self.answerer.answer([self._chat(messages)], until, **options)]
                messages, is_last, answers, info = messages_of(
                    document, round_idx=round_idx, previous_output=answers, previous_round_info=info
                )
                if is_last:
                    break
            results.append(list(answers))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval has no such tasks of messages."""
        raise ValueError("expected a task with answers; log-likelihoods are served by `--model mmar`.")

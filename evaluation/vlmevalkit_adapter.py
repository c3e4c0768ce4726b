"""
Evaluates an MMAR with VLMEvalKit.

    mmar evaluate vlmevalkit MODEL --data POPE --data MY_TABLE.tsv --work-dir runs/vlmevalkit

MODEL is a folder or Hub id. A benchmark is a name that the kit knows, its file in the kit's folder ($LMUData, or
~/LMUData) or downloaded by the kit, or the path of a table in the kit's layout. Answers are made in batches and kept
one by one: started again, a run goes on where it was stopped. Yes/no and multiple choice are scored by exact matching,
with no judge; benchmarks that need one take --judge and the kit's own settings of it.

The kit's own command runs the model too, for chats of several turns and under torchrun:

    python -c "from mmar.evaluation.vlmevalkit_adapter import register; register('my-mmar', 'MODEL')
    from vlmeval.run import main; main()" --model my-mmar --data MMDU --work-dir runs/vlmevalkit
"""

import filecmp
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..command import command_of
from ..modeling_mmar.configuration_mmar import shorten
from .answers import MMARAnswerer, generation_options
from .vlmevalkit_data import AnswersSoFar, chat_content, question_message, question_text, read_table, table_type


try:
    from vlmeval.config import supported_VLM
    from vlmeval.dataset import (
        DATASET_CLASSES,
        ImageMCQDataset,
        ImageYORNDataset,
        MMMUDataset,
        build_dataset,
    )
    from vlmeval.smp import LMUDataRoot, dump, get_pred_file_path
    from vlmeval.vlm.base import BaseModel
# Its import runs dozens of others, which raise what they like where one does not fit.
except Exception as error:
    _message = (
        f"VLMEvalKit cannot be imported: {type(error).__name__}: {error}. Install it with `pip install ms-vlmeval` "
        "(see docs/evaluation.md), in a separate environment if its dependencies do not fit yours."
    )
    raise ImportError(_message) from error


# Prompts of these are ours; others say themselves how a benchmark asks.
PLAIN_PROMPTS = (ImageMCQDataset.build_prompt, ImageYORNDataset.build_prompt, MMMUDataset.build_prompt)
EXACT_MATCHING = "exact_matching"
ANSWERS_NAME = "answers.jsonl"
RESULT_NAME = "result.json"
NUM_JUDGE_PROCESSES = 4
# Tables that `add_table` told the kit of.
OWN_TABLES: set[str] = set()


def dataset_class(name: str | None) -> type | None:
    """The kit's class of a benchmark; None for a table of the user's."""
    return next((cls for cls in DATASET_CLASSES if name in cls.supported_datasets()), None)


class MMARForVLMEvalKit(BaseModel):
    r"""
    MMAR as VLMEvalKit's model: pictures and texts in any order, several pictures, chats, batches.

    Args:
        model_path (`str`): Folder or Hub id.
        device (`str`, *optional*): Where it runs; the accelerator if there is one.
        dtype (`str`, *optional*): Of the weights; `"auto"` is as saved. float32 on a CPU by default, as saved
            elsewhere.
        batch_size (`int`, *optional*, defaults to 8): Messages that `generate_batch` answers together.
        **options: Arguments of `GenerationMixin.generate`; greedy by default.

    Raises:
        ValueError: If there is no whole MMAR, or an option is unknown.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        model_path: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        **options: Any,
    ):
        super().__init__()
        self.options = generation_options(options)
        self.answerer = MMARAnswerer.from_pretrained(model_path, device, dtype, batch_size)
        # Where images of rows are, in addition to the kit's own folder.
        self.image_folders: list[str] = []

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` asks the benchmark's questions: multiple choice, yes/no, and the user's tables."""
        found = dataset_class(dataset)
        return dataset is not None and (found is None or found.build_prompt in PLAIN_PROMPTS)

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """A row's pictures and question, with its options, asked for a direct answer."""
        has_picture = "image" in line or "image_path" in line
        pictures = self.dump_image(line, dataset) if has_picture else []
        is_yes_no = getattr(dataset_class(dataset), "TYPE", None) == "Y/N"
        return question_message(question_text(line, is_yes_no), list(pictures))

    def preproc_content(self, inputs: Any) -> Any:
        """As the kit's, but says what is wrong, and never takes a text for a file."""
        if isinstance(inputs, list) and all(isinstance(item, dict) for item in inputs):
            self._content(inputs)
            return inputs
        return super().preproc_content(inputs)

    def _content(self, message: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return chat_content(message, [LMUDataRoot(), *self.image_folders])

    def generate_batch(self, messages: list[list[dict[str, str]]], dataset: str | None = None) -> list[str]:
        r"""
        Answers messages as `generate_inner` answers each.

        Args:
            messages (`list[list[dict]]`): Each with items of `type` "text" or "image" and `value`.
            dataset (`str`, *optional*): The benchmark; part of the kit's signature.

        Returns:
            `list[str]`

        Raises:
            ValueError: If a message is empty, or an image cannot be read or is a file outside of the kit's folder.
        """
        chats = [[{"role": "user", "content": self._content(message)}] for message in messages]
        return self.answerer.answer(chats, **self.options)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answers one message; called by the kit's `generate`."""
        return self.generate_batch([message], dataset)[0]

    def chat_inner(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answers the last of several turns, each with `role` and `content`; called by the kit's `chat`."""
        chat = [{"role": turn["role"], "content": self._content(turn["content"])} for turn in messages]
        return self.answerer.answer([chat], **self.options)[0]


def register(name: str, model_path: str, **options: Any) -> None:
    r"""
    Makes a model known to VLMEvalKit in this process.

    Args:
        name (`str`): What `--model` of the kit's command calls it.
        model_path (`str`): Folder or Hub id.
        **options: Arguments of `MMARForVLMEvalKit`.
    """
    supported_VLM[name] = partial(MMARForVLMEvalKit, model_path=model_path, **options)


def add_table(path: Path, folder: Path) -> str:
    r"""
    Makes a table of the user's a benchmark of the kit, in a folder of the kit's that `LMUData` then names.

    Args:
        path (`Path`): TSV file; see `read_table`.
        folder (`Path`): Where the kit finds tables and puts pictures.

    Returns:
        `str`: The benchmark's name.

    Raises:
        ValueError: If the table is not as it should be, or the kit has a benchmark of this name.
    """
    kind = table_type(read_table(path), path.name)
    known = dataset_class(path.stem)
    if known is not None and not (known is ImageYORNDataset and path.stem in OWN_TABLES):
        raise ValueError(
            f"expected a table with a name of its own; {shorten(path.stem)} is a benchmark of the kit. Rename the "
            f"file, or put it into the kit's folder ($LMUData, or ~/LMUData) and say --data {path.stem}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    copied = folder / path.name
    if not copied.is_file() or not filecmp.cmp(path, copied, shallow=False):
        # With the pictures that the kit made of an old one.
        shutil.rmtree(folder / "images" / path.stem, ignore_errors=True)
        shutil.copyfile(path, copied)
    if kind == "Y/N":
        # The kit takes what it does not know for multiple choice or for open answers.
        ImageYORNDataset.DATASET_URL[path.stem] = path.name
        OWN_TABLES.add(path.stem)
    os.environ["LMUData"] = str(folder)
    return path.stem


def load_benchmark(name: str, work_dir: Path) -> Any:
    r"""
    The kit's data set of a benchmark.

    Args:
        name (`str`): A name that the kit knows, that of a table in its folder, or a table's path.
        work_dir (`Path`): Where the user's tables are put.

    Returns:
        `ImageBaseDataset`

    Raises:
        ValueError: If there is no such benchmark, its file cannot be had, or it is one of videos or of chats.
    """
    kit_folder = os.environ.get("LMUData")
    try:
        if name.endswith(".tsv"):
            name = add_table(Path(name), work_dir / "LMUData")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on tables that it does not know
            dataset = build_dataset(name)
    except ValueError:
        raise
    # The kit raises plain exceptions where a download fails, and asserts.
    except Exception as error:
        raise ValueError(
            f"expected the benchmark {name}; VLMEvalKit cannot load it: {type(error).__name__}: {shorten(error)}. Put "
            f"{name}.tsv into the kit's folder ($LMUData, or ~/LMUData), or give the path of a table."
        ) from error
    finally:
        os.environ.pop("LMUData", None)
        if kit_folder is not None:
            os.environ["LMUData"] = kit_folder
    if dataset is None:
        raise ValueError(
            f"expected a benchmark that VLMEvalKit knows, or {name}.tsv in the kit's folder ($LMUData, or ~/LMUData); "
            f"got {shorten(name)}. Give the path of a table (NAME.tsv) to use it from elsewhere."
        )
    if dataset.MODALITY == "VIDEO" or dataset.TYPE == "MT":
        raise ValueError(
            f"expected questions about pictures; {name} has {'videos' if dataset.TYPE != 'MT' else 'chats'}. MMAR "
            "reads no videos; chats run with the kit's own command, see --help."
        )
    return dataset


def infer(model: MMARForVLMEvalKit, dataset: Any, data: Any, answers: AnswersSoFar) -> None:
    r"""
    Answers the rows that have no answer yet, in batches, each kept as soon as it is known.

    Args:
        model (`MMARForVLMEvalKit`): The model.
        dataset (`ImageBaseDataset`): The kit's data set.
        data (`pandas.DataFrame`): Its rows to answer.
        answers (`AnswersSoFar`): Those that have one; gets the others.

    Raises:
        ValueError: If a row cannot be answered.
    """
    model.set_dump_image(dataset.dump_image)
    # Of a user's table it is not in the kit's folder; a benchmark of several has none of its own.
    model.image_folders = [dataset.img_root] if hasattr(dataset, "img_root") else []
    name, size = dataset.dataset_name, model.answerer.batch_size
    is_custom = model.use_custom_prompt(name) and not getattr(dataset, "force_use_dataset_prompt", False)
    left = [i for i in range(len(data)) if str(data.iloc[i]["index"]) not in answers.answers]
    for start in tqdm(range(0, len(left), size), desc=name, disable=not left):
        rows = [data.iloc[i] for i in left[start : start + size]]
        indices = [str(row["index"]) for row in rows]
        try:
            messages = [model.build_prompt(row, name) if is_custom else dataset.build_prompt(row) for row in rows]
            texts = model.generate_batch(messages, name)
        # An OSError is Pillow's, of a picture that is none.
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}, rows with index {', '.join(indices)}: {shorten(error)}") from error
        answers.add(dict(zip(indices, texts, strict=True)))


def table_fingerprint(data: Any) -> str:
    """Hash of all cells of a `pandas.DataFrame`."""
    digest = hashlib.sha256()
    for column in data.columns:
        for cell in (column, *data[column]):
            digest.update(f"{cell}\n".encode())
    return digest.hexdigest()[:16]


def as_records(scores: Any) -> Any:
    """The kit's scores, a table or a dict, as JSON holds them."""
    return scores.to_dict("records") if hasattr(scores, "to_dict") else scores


def evaluate(
    model: MMARForVLMEvalKit, name: str, benchmark: str, work_dir: Path, limit: int | None, judge: str
) -> dict[str, Any]:
    r"""
    Answers a benchmark's questions and has the kit score the answers.

    Args:
        model (`MMARForVLMEvalKit`): The model.
        name (`str`): The model's name in file names.
        benchmark (`str`): See `load_benchmark`.
        work_dir (`Path`): Files go to `work_dir/name/BENCHMARK`.
        limit (`int`, *optional*): So many rows from the first on.
        judge (`str`): The kit's name of the judge, or "exact_matching".

    Returns:
        `dict[str, Any]`: `rows`, `seconds` of answering, and `scores`, None where the kit cannot score.

    Raises:
        ValueError: If the benchmark cannot be had, a row cannot be answered, or the kit cannot score.
    """
    dataset = load_benchmark(benchmark, work_dir)
    dataset_name, data = dataset.dataset_name, dataset.data
    run = {
        "model": model.answerer.fingerprint(),
        "dtype": str(model.answerer.model.dtype),
        "table": table_fingerprint(data),
        "options": {key: str(value) for key, value in model.options.items()},
    }
    folder = work_dir / name / dataset_name
    answers = AnswersSoFar(folder / ANSWERS_NAME, run)
    data = data.iloc[:limit].copy()
    dataset.data = data
    start = time.perf_counter()
    infer(model, dataset, data, answers)
    seconds = time.perf_counter() - start

    # The kit takes what it finds of an earlier scoring for this one's.
    for path in folder.iterdir():
        if path.is_file() and path.name != ANSWERS_NAME:
            path.unlink()
    os.environ.setdefault("PRED_FORMAT", "tsv")
    prediction_file = get_pred_file_path(str(folder), name, dataset_name)
    predictions = data.drop(columns=["image"], errors="ignore")
    predictions["prediction"] = [answers.answers[str(index)] for index in data["index"]]
    dump(predictions, prediction_file)
    result = {"rows": len(data), "seconds": round(seconds, 1), "scores": None}
    if "answer" not in data:
        return result
    try:
        scores = dataset.evaluate(prediction_file, model=judge, nproc=NUM_JUDGE_PROCESSES, verbose=False)
    except NotImplementedError:
        return result  # open answers of a table of the user's
    except Exception as error:
        raise ValueError(
            f"{dataset_name}: VLMEvalKit could not score the answers: {type(error).__name__}: {shorten(error)}. They "
            f"are kept in {prediction_file}. A benchmark with open answers needs --judge."
        ) from error
    return {**result, "scores": as_records(scores)}


def main(
    model: str,
    data: Sequence[str],
    work_dir: Path,
    name: str | None,
    limit: int | None,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    max_new_tokens: int | None,
    judge: str,
) -> None:
    r"""
    Evaluates a model on benchmarks, and prints and writes the results.

    Args:
        model (`str`): Folder or Hub id of an MMAR.
        data (`Sequence[str]`): Benchmarks: names, or tables (NAME.tsv).
        work_dir (`Path`): Folder for answers and scores.
        name (`str`, *optional*): The model's name in file names; the last part of `model` by default.
        limit (`int`, *optional*): So many rows of each benchmark; all by default.
        batch_size, dtype, device, max_new_tokens (*optional*): As for `MMARForVLMEvalKit`.
        judge (`str`): The kit's judge for open answers.

    Raises:
        ValueError: As `evaluate` raises, or if a table or the model cannot be read.
    """
    for benchmark in data:
        if benchmark.endswith(".tsv"):
            table_type(read_table(Path(benchmark)), benchmark)  # what is wrong shows before the model is loaded
    adapter = MMARForVLMEvalKit(model, device, dtype, batch_size, max_new_tokens=max_new_tokens)
    facts = {
        "command": command_of(
            "evaluate",
            "vlmevalkit",
            model,
            data=data,
            work_dir=work_dir,
            name=name,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            max_new_tokens=max_new_tokens,
            judge=judge,
        ),
        "dtype": str(adapter.answerer.model.dtype),
        "threads": torch.get_num_threads(),
    }
    work_dir, name, results = work_dir.resolve(), name or Path(model).name, {}
    for benchmark in data:
        result = evaluate(adapter, name, benchmark, work_dir, limit, judge)
        results[Path(benchmark).stem if benchmark.endswith(".tsv") else benchmark] = result
        text = json.dumps({**facts, **result}, indent=1, default=float)
        (work_dir / name / Path(benchmark).stem / RESULT_NAME).write_text(text + "\n")
    print(json.dumps({**facts, "results": results}, indent=1, default=float))

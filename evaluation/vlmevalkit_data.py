"""VLMEvalKit's messages, questions and tables, and the answers of a run so far. Needs no kit."""

import csv
import json
import os
import re
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import path_inside
from ..modeling_mmar.configuration_mmar import shorten
from ..processors.image_processing_mmar import read_image_file


# LLaVA's words, which instruction tuning has; the Chinese ones are for Chinese questions.
MCQ_INSTRUCTION = "Answer with the option's letter from the given choices directly."
MCQ_INSTRUCTION_CN = "请直接回答选项字母。"
YES_NO_INSTRUCTION = "Please answer yes or no."
CHINESE = re.compile("[\u4e00-\u9fff]")
# MMMU says in its texts where each picture stands.
PLACE = re.compile(r"<image (\d+)>")
# The kit takes a shorter `image` for the index of the row that holds the picture.
MAX_INDEX_LENGTH = 64
YES_NO = {"Yes", "No"}


def is_given(value: Any) -> bool:
    """Whether a cell of a table holds something; pandas reads an empty one as NaN."""
    return value is not None and value == value and str(value) != ""


def options_of(line: Mapping[str, Any]) -> dict[str, str]:
    """The options of a multiple-choice question by letter; none for another question."""
    options = {letter: str(line[letter]) for letter in string.ascii_uppercase if is_given(line.get(letter))}
    return options if {"A", "B"} <= set(options) else {}


def question_text(line: Mapping[str, Any], is_yes_no: bool = False) -> str:
    r"""
    A question as the model is asked: with its options, and for a direct answer.

    Args:
        line (`Mapping`): Row of a table, with `question`, and perhaps `hint` and options `A`, `B` and so on.
        is_yes_no (`bool`, *optional*, defaults to `False`): Whether the answer is yes or no.

    Returns:
        `str`
    """
    question, options = str(line["question"]), options_of(line)
    parts = [str(line["hint"])] if is_given(line.get("hint")) else []
    parts += [question, *(f"{letter}. {option}" for letter, option in options.items())]
    if options:
        parts.append(MCQ_INSTRUCTION_CN if CHINESE.search("".join(parts)) else MCQ_INSTRUCTION)
    elif is_yes_no and "yes or no" not in question.lower():
        parts.append(YES_NO_INSTRUCTION)
    return "\n".join(parts)


def question_message(text: str, pictures: list[str]) -> list[dict[str, str]]:
    r"""
    A message of the kit: pictures, then the text; or pictures where the text says `<image 1>`.

    Args:
        text (`str`): The question.
        pictures (`list[str]`): Files.

    Returns:
        `list[dict[str, str]]`: Items with `type` and `value`.
    """
    parts = PLACE.split(text)  # text, number, text, number, ..., text
    numbers = [int(number) for number in parts[1::2]]
    if not numbers or not all(1 <= number <= len(pictures) for number in numbers):
        return [{"type": "image", "value": path} for path in pictures] + [{"type": "text", "value": text}]
    message = [{"type": "text", "value": parts[0]}]
    for number, rest in zip(numbers, parts[2::2], strict=True):
        message += [{"type": "image", "value": pictures[number - 1]}, {"type": "text", "value": rest}]
    return [item for item in message if item["value"]]


def chat_content(
    message: list[dict[str, Any]], folders: Sequence[str | os.PathLike] = ()
) -> list[dict[str, str | bytes]]:
    r"""
    A message of the kit as the content of a chat's turn.

    Args:
        message (`list[dict]`): Items with `type`, "text" or "image", and `value`, a text, or an image as data URI,
            base64 or file, in the order in which the model reads them.
        folders (`Sequence[str]`, *optional*): Where the kit keeps the images of its rows, the only files that are
            read: a message comes from the rows of a benchmark, which could name any file or address.

    Returns:
        `list[dict[str, str | bytes]]`: For `MMARProcessor.apply_chat_template`, with the content of the files.

    Raises:
        ValueError: If there is nothing to read, an item is of another type, or an image is not there itself nor the
            file of one in `folders`.
    """
    content = []
    for item in message:
        kind, value = item.get("type"), item.get("value")
        if kind not in ("text", "image") or not isinstance(value, str):
            raise ValueError(
                f'MMAR reads items such as {{"type": "text", "value": "..."}} and {{"type": "image", "value": FILE}}; '
                f"got type {shorten(kind)} with a value of type {type(value).__name__}. Videos are frames, given as "
                "images."
            )
        if kind == "text":
            content.append({"type": "text", "text": value})
            continue
        file = path_inside(value, folders) if os.path.isfile(value) else None
        try:
            image = read_image_file(value if file is None else Path(file), places=file is not None)
        except ValueError as error:
            raise ValueError(
                "an image must be here itself, as base64 or a data URI, or a file in the kit's folder ($LMUData, or "
                f"~/LMUData); {shorten(error)}"
            ) from error
        content.append({"type": "image", "image": image})
    if not any(item["type"] == "image" or item["text"].strip() for item in content):
        raise ValueError("a message must have text or a picture; got an empty one.")
    return content


def read_table(path: Path) -> list[dict[str, str]]:
    r"""
    Reads a table in VLMEvalKit's layout, and checks what the kit takes for granted.

    Args:
        path (`Path`): TSV file with the columns `index` and `question`; pictures in `image`, base64 or the index of
            the row that holds the picture, or `image_path`; the options of multiple choice in `A`, `B` and so on; the
            right letter, or Yes or No, in `answer`.

    Returns:
        `list[dict[str, str]]`: One dict per row.

    Raises:
        ValueError: If the file is not there, lacks a column, has no rows, or an index twice, or names a picture that
            no row holds.
    """
    if not path.is_file():
        raise ValueError(f"expected a table (NAME.tsv) in VLMEvalKit's layout; there is no file {shorten(str(path))}.")
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"expected a table in UTF-8 with tabs in {shorten(path.name)}; it cannot be read: {shorten(error)}."
        ) from error
    if missing := [name for name in ("index", "question") if not rows or name not in rows[0]]:
        raise ValueError(
            f"{path.name} must have rows, and the columns index and question; got {len(rows)} rows without "
            f"{' and '.join(missing)}. Columns are parted by tabs."
        )
    held = {row["index"] for row in rows if len(row.get("image") or "") > MAX_INDEX_LENGTH}
    seen = set()
    for number, row in enumerate(rows):
        if row["index"] in seen:
            raise ValueError(
                f"{path.name} must have each index once; got {shorten(row['index'])} again in row {number}."
            )
        seen.add(row["index"])
        image = row.get("image") or ""
        if image and len(image) <= MAX_INDEX_LENGTH and image not in held:
            raise ValueError(
                f"{path.name}: `image` must be a picture in base64 or the index of a row that holds one; row {number} "
                f"has {shorten(image)}. Put the picture there."
            )
    return rows


def table_type(rows: list[dict[str, str]], name: str) -> str | None:
    r"""
    How the kit scores a table: "MCQ" with options, "Y/N" where every answer is Yes or No, None for open answers.

    Args:
        rows (`list[dict[str, str]]`): The table.
        name (`str`): Its name, for messages.

    Returns:
        `str`, *optional*

    Raises:
        ValueError: If yes and no are spelled so that the kit would count each answer as wrong.
    """
    if all(options_of(row) for row in rows):
        return "MCQ"
    answers = {row.get("answer") or "" for row in rows}
    if answers <= YES_NO:
        return "Y/N"
    if {answer.strip().lower() for answer in answers} <= {"yes", "no"}:
        raise ValueError(
            f"{name}: answers must be spelled Yes and No, which the kit compares letter by letter; got "
            f"{', '.join(sorted(answers))}."
        )
    return None


class AnswersSoFar:
    r"""
    The answers of a run in a file, a line each as soon as it is known: a run that was killed goes on from there.

    Args:
        path (`Path`): JSON lines; made if it does not exist. A last line that was not written whole is cut off.
        run (`dict[str, Any]`): What the answers hang on, kept in the first line.

    Raises:
        ValueError: If the file holds the answers of another run, or something else.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path = path
        self.answers: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            self._write([{"run": run}], "wb")
            return
        try:
            first, *lines = map(json.loads, whole.decode("utf-8").splitlines())
            begun, answers = dict(first["run"]), {line["index"]: line["answer"] for line in lines}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"expected the answers of a run in {shorten(str(path))}, a JSON object on each line; got something "
                f"else ({type(error).__name__}: {shorten(error)}). Mend the file, name another --work_dir, or delete "
                "the file to begin anew."
            ) from error
        if first != {"run": json.loads(json.dumps(run))}:
            changed = [name for name in run if begun.get(name) != run[name]]
            raise ValueError(
                f"expected the answers of the same run in {shorten(str(path))}; {', '.join(changed) or 'the run'} "
                "changed since. Name another --work_dir, or delete the file to begin anew."
            )
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        self.answers = answers

    def add(self, answers: Mapping[str, str]) -> None:
        """Adds answers by index; they are on the disk when this returns."""
        self._write([{"index": index, "answer": answer} for index, answer in answers.items()], "ab")
        self.answers |= answers

    def _write(self, lines: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

"""
A training row: what it holds, how columns of other layouts become one, and how its pictures are opened.

A row is a dict. It has one picture, `image` (content of a file as bytes, its path, or a PIL picture), or several,
`images`, or `latents` in their place (latents.py), or none; and any of

    captions            list of str
    questions, answers  lists of str, pair by pair. Two more lists may go with the answers: `depends_on`, the kind of
                        views (views.py) that an answer holds for, and `swaps`, the part of an answer that names the
                        content, or None
    messages            a chat as `MMARProcessor.apply_chat_template` reads it, `{"type": "image"}` standing for the
                        next picture; the assistant's turns are learned
    id                  str or int, for reports

Pictures are not opened until `open_pictures`: a row costs what its bytes cost.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from huggingface_hub import constants
from PIL import Image

from ..files import path_inside
from ..modeling_mmar.configuration_mmar import MAX_SHOWN_LENGTH, shorten, shorten_names
from ..processors.image_processing_mmar import MAX_IMAGE_BYTES, read_image_file, read_rgb_image
from ..processors.processing_mmar import IMAGE_TOKEN_ALIAS
from .views import KINDS


# Longest sample of a tar shard, in bytes: far above any photo, far below what a process has.
MAX_SAMPLE_BYTES = 2**28
# Longest reason for which a row is not used, in characters.
MAX_REASON_LENGTH = 1000
# How pictures begin in base64: JPEG in both alphabets, PNG, GIF, WebP, TIFF in both byte orders, BMP.
BASE64_BEGINNINGS = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk")
# Shorter texts that begin so are paths.
MIN_BASE64_LENGTH = 40

# Members of a tar shard that are pictures, by their last extension.
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
# And those that are texts.
TEXT_EXTENSIONS = ("txt", "caption")
# Columns in which a row's keys are looked for, the first that has a value; `columns` names others. `jpg`, `txt`,
# `json` and `__key__` are what `datasets` makes of tar shards, `text` of the metadata of image folders,
# `texts` what the_cauldron and FineVision call their chats.
COLUMN_NAMES = {
    "image": ("image", *PICTURE_EXTENSIONS),
    "images": ("images",),
    "captions": ("captions", "txt", "caption", "text"),
    "questions": ("questions", "question"),
    "answers": ("answers", "answer"),
    "depends_on": ("depends_on",),
    "swaps": ("swaps",),
    "messages": ("messages", "conversations", "texts"),
    "id": ("id", "__key__"),
}
TEXT_LISTS = ("captions", "questions", "answers")
# LLaVA's names of who speaks, and OpenAI's.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# In a stream, where an error would end everything, a row that cannot be read has only this key, with the reason.
UNREADABLE = "unreadable"


class BadRow(ValueError):
    """A row that cannot be used: it is skipped, counted and reported, in at most `MAX_REASON_LENGTH` characters."""

    def __init__(self, reason: str):
        super().__init__(shorten(ValueError(reason), MAX_REASON_LENGTH))


@contextmanager
def as_bad_row(name: str) -> Iterator[None]:
    """Within the context whatever goes wrong is a `BadRow`: readers and decoders raise what they meet."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(f"{name} cannot be used: {type(error).__name__}: {shorten(error)}.") from error


def check_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    r"""
    Checks what can be checked of a row without opening its pictures.

    Args:
        row (`dict`): A training row.
        name (`str`): What to call it in errors.

    Returns:
        `dict`: The row.

    Raises:
        BadRow: If it came unreadable from a stream, or has neither picture nor chat, a picture that is no file's
            content or path, an empty text, questions and answers of unequal number, an unknown kind or a swap that is
            not in its answer, or a chat that does not fit its pictures or has nothing to learn.
    """
    if UNREADABLE in row:
        raise BadRow(row[UNREADABLE])
    pictures = pictures_of(row)
    if not pictures and "latents" not in row and not row.get("messages"):
        raise BadRow(
            f"{name} must hold a picture as `image`, several as `images`, or a chat as `messages`; got "
            f"{shorten_names(sorted(row)) or 'nothing'}. Name the columns with `columns`, or drop the row."
        )
    for picture in pictures:
        _check_picture(picture, name)
    for column in TEXT_LISTS:
        texts = [] if row.get(column) is None else row[column]
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise BadRow(f"{name} must have `{column}` as a list of strings; got {shorten(texts)}. Make it a list.")
        if not all(text and text.strip() for text in texts):
            raise BadRow(
                f"{name} must have `{column}`, none of them empty; got {shorten(texts)}. Drop the row or fill it."
            )
    questions, answers = row.get("questions") or [], row.get("answers") or []
    if len(questions) != len(answers):
        raise BadRow(
            f"{name} must have one answer per question; got {len(questions)} questions and {len(answers)} answers."
        )
    legal = {
        "depends_on": f"one of {', '.join(KINDS)}",
        "swaps": "a text that stands in it once, before a space, or null",
    }
    for column, what in legal.items():
        if row.get(column) is None:
            continue
        values = row[column]
        good = isinstance(values, list) and len(values) == len(answers)
        for value, answer in zip(values, answers, strict=True) if good else ():
            # Something must follow that can be learned, and begin a token of its own.
            is_part = isinstance(value, str) and bool(value.strip()) and answer.count(value) == 1
            is_part = is_part and answer.partition(value)[2][:1].isspace()
            good &= value in KINDS if column == "depends_on" else value is None or is_part
        if not good:
            raise BadRow(f"{name} must have `{column}` with, for each answer, {what}; got {shorten(values)}.")
    if row.get("messages"):
        _check_chat(row["messages"], 1 if "latents" in row else len(pictures), name)
    return row


def row_id(row: dict[str, Any]) -> int | str | None:
    """What reports call a row: its `id`, shortened if it is none."""
    given = row.get("id")
    is_short = isinstance(given, str) and len(given) <= MAX_SHOWN_LENGTH
    return given if given is None or type(given) is int or is_short else shorten(given)


def pictures_of(row: dict[str, Any]) -> list[Any]:
    """A row's pictures, unopened, in the order of its image marks; none if it has latents in their place."""
    return [row["image"]] if row.get("image") is not None else list(row.get("images") or ())


def open_pictures(row: dict[str, Any], name: str = "the row") -> list[Image.Image]:
    r"""
    Opens and decodes the pictures of a row: upright, RGB, transparency over white.

    Args:
        row (`dict`): A training row.
        name (`str`, *optional*, defaults to `"the row"`): What to call it in errors.

    Returns:
        `list[PIL.Image.Image]`: One picture per entry of `pictures_of`.

    Raises:
        BadRow: If a picture is missing, empty, broken, truncated or too large.
    """
    opened = []
    for number, picture in enumerate(pictures_of(row)):
        _check_picture(picture, name)
        try:
            # A path here is one that `make_row` made of what the data says: of a file, never of a URL.
            opened.append(read_rgb_image(Path(picture) if isinstance(picture, str) else picture))
        except Exception as error:
            raise BadRow(
                f"{name} must hold pictures that can be read; picture {number} cannot: {shorten(error, 500)}"
            ) from error
    return opened


def open_cell(value: Any, folder: str | Path, name: str) -> Image.Image:
    r"""
    Opens the picture of one cell of a table, in whatever form a training row may have it.

    Args:
        value: The picture itself, or the path of a file in `folder`.
        folder (`str` or `Path`): Where the table is.
        name (`str`): What to call the row in errors.

    Returns:
        `PIL.Image.Image`: As `open_pictures` gives it.

    Raises:
        BadRow: If there is no picture or more than one, it leads out of the folder, or it cannot be read.
    """
    pictures = open_pictures(make_row({"image": value}, {}, folder, name), name)
    if len(pictures) != 1:
        raise BadRow(f"{name} must hold one picture; got {len(pictures)}. Give each a row of its own.")
    return pictures[0]


# Columns to rows


def check_columns(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    columns = dict(columns or {})
    if not set(columns) <= set(COLUMN_NAMES) or not all(isinstance(name, str | None) for name in columns.values()):
        raise ValueError(
            f"`columns` must give names of columns, or null, for some of {', '.join(COLUMN_NAMES)}; got "
            f"{shorten(columns)}."
        )
    return columns


def wanted_columns(existing: Sequence[str], columns: dict[str, str | None], where: str) -> list[str]:
    """Columns of a table that rows are made of; raises ValueError if some are missing."""
    # Some may stand within `json`, which holds the JSON of tar shards.
    missing = [column for column in columns.values() if column is not None and column not in existing]
    if missing and "json" not in existing:
        raise ValueError(
            f"expected the columns {shorten_names(missing)} of `columns` in {where}; it has "
            f"{shorten_names(existing)}. Check their names."
        )
    names = {key: (columns[key],) if key in columns else COLUMN_NAMES[key] for key in COLUMN_NAMES}
    if not {*names["image"], *names["images"], *names["messages"], "json"} & set(existing):
        raise ValueError(
            f"expected a column of pictures or chats in {where}, one of {', '.join(COLUMN_NAMES['image'])}, images, "
            f"{', '.join(COLUMN_NAMES['messages'])}; it has {shorten_names(existing)}. Name it with "
            "`columns`, such as {'image': 'photo'}; `python -m mmar.training.emoji_rows` shows how to make them."
        )
    known = {"json", *itertools.chain.from_iterable(names.values())}
    return [name for name in existing if name in known]


def unused_columns(existing: Sequence[str], columns: dict[str, str | None]) -> tuple[list[str], dict[str, str]]:
    r"""
    Columns that no rule takes.

    Args:
        existing (`Sequence[str]`): Names of columns.
        columns (`dict[str, str]`): Columns by our keys.

    Returns:
        `list[str]`: Those that are never read.
        `dict[str, str]`: Those that are read only where another one, the value, is empty.
    """
    read: dict[str, list[str]] = {}
    for key, names in COLUMN_NAMES.items():
        names = [columns[key]] if columns.get(key) is not None else [] if key in columns else names
        read[key] = [name for name in names if name in existing]
    second = {name: names[0] for names in read.values() for name in names[1:]}
    for key in ("questions", "answers") if read["messages"] else ():
        second |= dict.fromkeys(read[key], read["messages"][0])
    left_out = {name for key in columns if columns[key] is None for name in COLUMN_NAMES[key]}
    known = {"json", "__key__", "__url__", *itertools.chain.from_iterable(read.values()), *left_out}
    return [name for name in existing if name not in known], second


def make_row(
    record: dict[str, Any], columns: dict[str, str | None], folder: str | Path | None, name: str
) -> dict[str, Any]:
    """
    A training row from columns of whatever layout. Paths of pictures must lie in `folder`, or, for None, in the caches
    of data sets of the Hub. Raises `BadRow`.
    """
    with as_bad_row(name):
        return _make_row(record, columns, folder, name)


def _make_row(
    record: dict[str, Any], columns: dict[str, str | None], folder: str | Path | None, name: str
) -> dict[str, Any]:
    if isinstance(record.get("json"), dict):
        record = {**record["json"], **record}
    values = {key: _value(record, key, columns, name) for key in COLUMN_NAMES}
    row: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    for key in TEXT_LISTS:
        if isinstance(row.get(key), str):
            row[key] = [row[key]]
    if "id" in row:
        row["id"] = row_id(row)
    pictures = _given_pictures(row.pop("image", None), row.pop("images", None), columns, name)
    if "messages" in row:
        row["messages"], inside = _chat(row["messages"], name)
        if all(_is_nothing(picture) for picture in pictures):
            pictures = []  # text-only rows have `image: ""`, or a list of nothing
        elif not inside:
            _mark_pictures(row["messages"], len(pictures))
        if inside and pictures:
            raise BadRow(f"{name} must have its pictures in its chat, or beside it; got both. Keep one.")
        pictures = pictures or inside
    pictures = [_picture(picture, folder, name) for picture in pictures]
    if len(pictures) == 1:
        row["image"] = pictures[0]
    elif pictures:
        row["images"] = pictures
    return check_row(row, name)


def _value(record: dict[str, Any], key: str, columns: dict[str, str | None], name: str) -> Any:
    if key not in columns:
        return next((record[column] for column in COLUMN_NAMES[key] if record.get(column) is not None), None)
    column = columns[key]
    if column is not None and column not in record:
        raise BadRow(
            f"{name} must have the column {shorten(column)} for `{key}`; it has {shorten_names(sorted(record))}."
        )
    return None if column is None else record[column]


def _given_pictures(image: Any, images: Any, columns: dict[str, str | None], name: str) -> list[Any]:
    """What stands for pictures beside a chat; LLaVA's `image` may be a list."""
    if columns.get("image") is not None and "images" not in columns:
        images = None
    elif columns.get("images") is not None and "image" not in columns:
        image = None
    if images is not None and not isinstance(images, list):
        raise BadRow(f"{name} must have `images` as a list; got {type(images).__name__}. Use `image` for one picture.")
    if image is not None and images:
        raise BadRow(f"{name} must have `image` or `images`; got both. Leave one out: `columns` with images: null.")
    if image is not None:
        return image if isinstance(image, list) else [image]
    return images or []


def _is_nothing(picture: Any) -> bool:
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    return picture is None or (isinstance(picture, (str, bytes)) and not picture)


def _picture(value: Any, folder: str | Path | None, name: str) -> bytes | str | Image.Image:
    """A picture as bytes, as the absolute path of a file that a row may name, or PIL picture; not opened."""
    if isinstance(value, dict):
        # As `datasets` stores pictures.
        value = value.get("bytes") or value.get("path") or b""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return read_rgb_image(value)
    if isinstance(value, (bytearray, memoryview)) or hasattr(value, "read"):
        return read_image_file(value, places=False)
    if not isinstance(value, str) or not value:
        return value
    if value[:5].lower() == "data:":
        try:
            return read_image_file(value, places=False)
        except ValueError as error:
            raise BadRow(f"{name} must hold its picture in base64 after the comma; {shorten(error)}") from error
    if value.startswith(BASE64_BEGINNINGS) and len(value) >= MIN_BASE64_LENGTH:
        with suppress(ValueError):  # or it is a path that begins so
            return read_image_file(value, places=False)
    if "://" in value or "::" in value:
        return _read_archived(value, folder, name)
    return _path_inside(value, folder, name)


def _path_inside(path: str, folder: str | Path | None, name: str) -> str:
    """The absolute path of a picture's file; rows come from others, who must not choose any file of this machine."""
    if folder is None:
        # A data set of the Hub: `datasets` names files in its own caches.
        allowed = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
        allowed += [datasets.config.EXTRACTED_DATASETS_PATH, constants.HF_HUB_CACHE]
    else:
        path, allowed = os.path.join(folder, path), [folder]
    if (inside := path_inside(path, allowed)) is None:
        where = "the caches of `datasets`" if folder is None else shorten(str(folder))
        raise BadRow(
            f"{name} must name its picture's file inside {where}, links followed; got {shorten(path)}. Set "
            "`image_folder` to a folder that holds all of them."
        )
    return inside


def _read_archived(url: str, folder: str | Path | None, name: str) -> bytes:
    """A picture on the Hub, or in a zip there or in the folder, as `datasets` names what it streams."""
    member, is_chained, archive = url.partition("::")
    if not is_chained:
        archive = url
    elif member.startswith("zip://") and "://" not in archive and "::" not in archive:
        archive = _path_inside(archive, folder, name)
        url = f"{member}::{archive}"
    is_file = is_chained and os.path.isabs(archive)
    if (
        "::" in archive
        or (is_chained and not member.startswith("zip://"))
        or not (is_file or archive.startswith("hf://"))
    ):
        raise BadRow(
            f"{name} must hold its picture's file, as path, bytes, hf://... or zip://...::hf://...; got "
            f"{shorten(url)}, where no file is that a row may name. Download the picture, and name its file."
        )
    try:
        with fsspec.open(url, "rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    except Exception as error:
        raise BadRow(
            f"{name} must hold its picture's file; {shorten(url)} cannot be read: {shorten(error)}."
        ) from error
    if len(content) > MAX_IMAGE_BYTES:
        raise BadRow(f"{name} must hold a picture of at most {MAX_IMAGE_BYTES} bytes; {shorten(url)} has more.")
    return content


def _check_picture(picture: Any, name: str) -> None:
    if isinstance(picture, (Image.Image, np.ndarray, torch.Tensor)) or (isinstance(picture, bytes) and picture):
        return
    if isinstance(picture, (str, Path)) and str(picture):
        if os.path.isfile(picture):
            return
        got = f"{shorten(str(picture))}, where no file is"
    else:
        is_empty = picture is None or isinstance(picture, (bytes, str))
        got = "none" if is_empty else type(picture).__name__
    raise BadRow(
        f"{name} must hold its picture's file, as {{bytes, path}}, bytes or path; got {got}. Fill it, check the "
        "folder, or drop the row."
    )


def _chat(turns: Any, name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns of LLaVA or OpenAI as `apply_chat_template` reads them, and the pictures that stand in them."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"{name} must have its chat as a list of turns; got {shorten(turns)}.")
    messages, pictures = [], []
    for turn in itertools.chain.from_iterable(map(_single_turns, turns)):
        speaker = turn.get("from") or turn.get("role")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRow(f"{name} must have turns from {', '.join(ROLES)}; got one from {shorten(speaker)}.")
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
        # Only a string has marks; in a list of parts a picture is a part of its own, and `<image>` is text.
        parts = _split_at_marks(content) if isinstance(content, str) else content or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise BadRow(f"{name} must have turns of text and pictures; got {shorten(content)}.")
        items = []
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                items.append({"type": "text", "text": part["text"]})
            elif part.get("type") in ("image", "image_url"):
                items.append({"type": "image"})
                sources = [part.get(key) for key in ("image", "path", "url", "image_url")]
                picture = next((source for source in sources if source is not None), None)
                picture = picture["url"] if isinstance(picture, dict) and "url" in picture else picture
                pictures += [] if picture is None else [picture]
            else:
                raise BadRow(f"{name} must have turns of text and pictures; got a part {shorten(part)}.")
        messages.append({"role": ROLES[speaker], "content": items})
    return messages, pictures


def _single_turns(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn of question and answer, as the_cauldron and FineVision have them, as two; others as they are."""
    if not ("user" in turn and "assistant" in turn):
        return [turn]
    roles = [*(["system"] if turn.get("system") else []), "user", "assistant"]
    return [{"role": role, "content": turn[role]} for role in roles]


def _mark_pictures(messages: list[dict[str, Any]], num_pictures: int) -> None:
    """Where a chat has no mark, its pictures go before the first turn of the user, in place."""
    if any(item["type"] == "image" for message in messages for item in message["content"]):
        return
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": "image"}] * num_pictures + first["content"]


def _split_at_marks(text: str) -> list[dict[str, str]]:
    """Text and pictures of a turn. Space beside a mark goes: the chat template sets its own."""
    pieces = text.split(IMAGE_TOKEN_ALIAS)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    items: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        items += [{"type": "image"}] if number > 0 else []
        items += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return items


def _check_chat(messages: Any, num_pictures: int, name: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(f"{name} must have `messages` as a list of turns; got {shorten(messages)}.")
    num_marks, answers = 0, 0
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        items = items if isinstance(items, list) else [items]
        kinds = [item.get("type") if isinstance(item, dict) else type(item).__name__ for item in items]
        if role not in ROLES.values() or not all(kind in ("text", "image") for kind in kinds):
            raise BadRow(
                f"{name} must have turns of user, assistant or system with text and pictures; turn {number} is of "
                f"{shorten(role)} with {shorten(kinds)}."
            )
        texts = [item.get("text") for item in items if item["type"] == "text"]
        if not items or not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadRow(f"{name} must have no empty turn; turn {number}, of the {role}, is. Drop the row or fill it.")
        if "image" in kinds and role == "assistant":
            raise BadRow(
                f"{name} must have its pictures in turns of the user; turn {number}, the assistant's, has one."
            )
        num_marks, answers = num_marks + kinds.count("image"), answers + (role == "assistant")
    if answers == 0:
        raise BadRow(f"{name} must have a turn of the assistant, which is learned; got none.")
    if num_marks != num_pictures:
        raise BadRow(
            f"{name} must have one mark {IMAGE_TOKEN_ALIAS} per picture; got {num_marks} marks for {num_pictures} "
            "pictures. Add or drop marks, or drop the row."
        )

"""Folders of MMARs: written whole or not at all, and read."""

import contextlib
import errno
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING

from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.saving_mmar import apply_umask


@contextlib.contextmanager
def new_folder(out: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    r"""
    Gives a folder to write to, and moves it to `out` once everything is written; if anything fails, nothing is left.

    Args:
        out (`str` or `Path`): The folder to make; may exist if it is empty.
        num_bytes (`int`, *optional*, defaults to 0): About how much will be written.

    Yields:
        `Path`: The folder to write to, on the same disk.

    Raises:
        ValueError: If `out` is a file or holds something, or the disk has no room.
    """
    out = Path(out).absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        is_what = "a file" if out.is_file() else "not empty"
        raise ValueError(
            f"expected a new or empty folder to write to; {shorten(str(out))} is {is_what}. Name another, or remove "
            "it."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"expected folders above {shorten(str(out))}; one of them is a file. Name another, or remove it."
        ) from error
    if (free := shutil.disk_usage(out.parent).free) < num_bytes:
        raise ValueError(
            f"expected {num_bytes / 1e9:.1f} GB of room for {shorten(str(out))}; the disk has {free / 1e9:.1f} GB. "
            "Make room, or name a folder on another disk."
        )
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}.unfinished")
    unfinished.mkdir()
    try:
        yield unfinished
        apply_umask(unfinished)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(
                f"expected room for {shorten(str(out))}; the disk is full, and nothing was left there. Make room, or "
                "name a folder on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_config(folder: str | Path) -> MMARConfig:
    r"""
    Args:
        folder (`str` or `Path`): A local MMAR folder.

    Returns:
        `MMARConfig`, or one that builds on it.

    Raises:
        ValueError: If there is no readable config.json, or it is another model's.
    """
    try:
        model_type = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected the folder of an MMAR; {shorten(str(folder))} has no readable config.json ({shorten(error)})."
        ) from error
    # MMAR, and what builds on it (ablations/).
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    if config_class is None or not issubclass(config_class, MMARConfig):
        raise ValueError(
            f"expected an MMAR's config in {shorten(str(folder))}; got the model type {shorten(model_type)}."
        )
    return config_class.from_pretrained(folder)


def check_shard_size(size: str | int) -> None:
    """Raises a `ValueError` if it is no number of bytes above 0, such as `"5GB"`."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.upper()) if isinstance(size, str) else None
    num_bytes = float(number[1]) if number else size
    if isinstance(num_bytes, (bool, str)) or not num_bytes > 0:
        raise ValueError(f"`max_shard_size` must be above 0 bytes, such as '5GB' or '500MB'; got {shorten(size)}.")

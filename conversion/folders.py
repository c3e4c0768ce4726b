"""Writes folders whole or not at all."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
            f"expected a new or empty folder to write to; {str(out)!r} is {is_what}. Name another, or remove it."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < num_bytes:
        raise ValueError(
            f"expected {num_bytes / 1e9:.1f} GB of room for {str(out)!r}; the disk has {free / 1e9:.1f} GB. Make "
            "room, or name a folder on another disk."
        )
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is for its owner alone
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(
                f"expected room for {str(out)!r}; the disk is full, and nothing was left there. Make room, or name a "
                "folder on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

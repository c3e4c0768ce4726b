"""Files that are there in whole or not at all, for commands that may be killed and go on."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


# Ending of files that are being written; their names begin with a dot, which hides them from those who list a folder.
UNFINISHED = ".unfinished"


def check_folder(path: Path, option: str = "--out") -> None:
    r"""
    Looks at where results are to go, before hours are spent on them.

    Args:
        path (`Path`): A folder, or what is to become one.
        option (`str`, *optional*, defaults to `"--out"`): What the user named it with.

    Raises:
        ValueError: If it is a file, or lies below one.
    """
    standing = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not standing.is_dir():
        raise ValueError(f"expected a folder for {option}; {standing} is a file. Name another.")


def path_inside(path: str | os.PathLike, folders: Iterable[str | os.PathLike]) -> str | None:
    r"""
    Looks at a path that somebody else named, who must not reach any file of this machine.

    Args:
        path (`str` or `Path`): Absolute, or relative to the current folder.
        folders (`Iterable`): Where it may lead.

    Returns:
        `str`: The absolute path; None if it leads out of all folders, also over links.
    """
    real = Path(os.path.realpath(path))
    inside = any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
    return os.path.abspath(path) if inside else None


def write_whole(path: Path, content: bytes) -> None:
    r"""
    Writes a file in whole or not at all, whatever happens to this process or the power.

    Args:
        path (`Path`): The file; its folder is made if it is missing.
        content (`bytes`): What it is to hold.

    Raises:
        OSError: If it cannot be written; names the file, and leaves what stood there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        # A write, unlike an open, does not say to which file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)

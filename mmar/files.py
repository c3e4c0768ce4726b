"""Files that are there in whole or not at all, for commands that may be killed and go on."""

import os
import uuid
from pathlib import Path


# Ending of files that are being written; their names begin with a dot, which hides them from those who list a folder.
UNFINISHED = ".unfinished"


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

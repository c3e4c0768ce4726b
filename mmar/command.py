"""How MMAR's commands end: with one line that says what is wrong, and not with a traceback."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm


# Their messages say what is wrong with the input, a file or the network; other kinds are named too.
SPEAKING_ERRORS = (ValueError, OSError, StrictDataclassError, SafetensorError)
# What PyTorch puts before the message of an error that was raised in a worker of a `DataLoader`.
WORKER_TRACEBACK = re.compile(
    r"Caught (?P<kind>\w+) in .* process \d+\.\nOriginal Traceback .*^(?:\w+\.)*(?P=kind)(?:: |$)",
    flags=re.DOTALL | re.MULTILINE,
)
# Of the line; some libraries name each of a model's weights.
MAX_LENGTH = 2000


def run_command(main: Callable[[], None]) -> None:
    r"""
    Runs a command. An error ends it with one line on stderr and status 1, also where it comes from the worker of a
    `DataLoader`.

    Args:
        main (`Callable`): The command. With `MMAR_TRACEBACK=1` in the environment its errors are raised as they are.
    """
    if os.environ.get("MMAR_TRACEBACK") == "1":
        main()
        return
    try:
        main()
    except Exception as error:
        # A progress bar that is still open would stand before the error in its line.
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        sys.exit(f"error: {_in_one_line(error)} (MMAR_TRACEBACK=1 shows where)")


def command_of(*words: object, **options: Any) -> str:
    r"""
    The command line with which a command is started again.

    Args:
        *words: Of the command, without `mmar`.
        **options: Of it, such as `batch_size=8`; of those that are None nothing is said, and a list is given one by
            one.

    Returns:
        `str`: For a shell.
    """
    line = ["mmar", *map(str, words)]
    for name, values in options.items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            line += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line)


def _in_one_line(error: Exception) -> str:
    text, kind = str(error), type(error).__name__
    if found := WORKER_TRACEBACK.match(text):
        text, kind = text[found.end() :], found["kind"]
    text = " ".join(text.split())
    text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."
    if text and isinstance(error, SPEAKING_ERRORS):
        return text
    return f"{kind}: {text}" if text else kind

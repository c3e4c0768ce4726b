"""How MMAR's commands end: with one line that says what is wrong, and not with a traceback."""

import os
import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError


def run_command(main: Callable[[], None]) -> None:
    r"""
    Runs a command. A `ValueError`, with which MMAR refuses its input, the `StrictDataclassError` that a config makes
    of it, or an `OSError`, of files and the network, ends it with one line on stderr and status 1.

    Args:
        main (`Callable`): The command. With `MMAR_TRACEBACK=1` in the environment its errors are raised as they are.
    """
    if os.environ.get("MMAR_TRACEBACK") == "1":
        main()
        return
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"error: {text} (MMAR_TRACEBACK=1 shows where)")

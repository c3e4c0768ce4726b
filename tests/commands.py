"""The command line `mmar` in this process, which would start for seconds each time."""

import pytest

from mmar_cli.app import app


def mmar(*words: object) -> None:
    """Runs `mmar` with these words; its errors are raised as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMAR_TRACEBACK", "1")
        app([str(word) for word in words], standalone_mode=False)

"""
The command line `mmar`, which is also `python -m mmar`.

This package lies outside of `mmar`, whose import registers the models and costs seconds: commands are declared with
typer and nothing else, and each imports its work when it runs. Command names and options may be written with `-` or
`_`.
"""

from . import conversion, evaluation, generation, training  # noqa: F401
from .app import app


def main() -> None:
    """Runs the command that `sys.argv` asks for."""
    app(prog_name="mmar")

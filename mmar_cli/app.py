"""The typer application, and what its commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


# Where the other folders lie: next to this one in a checkout, in the package once it is installed.
ROOT = next(
    root for root in (Path(__file__).parents[1], Path(__file__).parents[1] / "mmar") if (root / "training").is_dir()
)

app = typer.Typer(
    help="Generates images from text and text from images with MMAR, and trains, converts and measures such models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


def command(group: typer.Typer, name: str | None = None, **settings: Any) -> Callable[[Callable], Callable]:
    r"""
    Adds a function to the command line. An error of it ends the command with one line and status 1.

    Args:
        group (`typer.Typer`): Where it belongs.
        name (`str`, *optional*): Of the command; the function's by default.
        **settings: As typer's `command` takes them.
    """

    def add(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            # It imports the package, and with it torch.
            from mmar.command import run_command

            run_command(lambda: function(**arguments))

        group.command(name, **settings)(run)
        return function

    return add


def command_group(name: str, about: str, parent: typer.Typer = app) -> typer.Typer:
    """Adds a group of commands, with what its help says."""
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
    parent.add_typer(group, name=name)
    return group

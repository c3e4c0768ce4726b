"""`mmar train` and what prepares a training."""

import ast
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from .app import ROOT, app, command


# Where MMAR's own keys of a recipe are declared.
KEYS = {"training/recipe.py": "DataArguments", "training/trainer.py": "MMARTrainingArguments"}


def own_keys() -> list[tuple[str, str]]:
    """
    MMAR's own keys of a recipe, each with what it is and its default. They are read from the source of their
    dataclasses, since importing these takes seconds.
    """
    keys = []
    for file, name in KEYS.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        declared = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for field in (node for node in declared if isinstance(node, ast.AnnAssign)):
            given = {keyword.arg: keyword.value for keyword in field.value.keywords}
            default = given["default_factory"].body if "default_factory" in given else given.get("default")
            about = ast.literal_eval(given["metadata"])["help"]
            keys.append(
                (field.target.id, about + (f" (default: {ast.unparse(default)})" if default is not None else ""))
            )
    return keys


class TrainCommand(TyperCommand):
    """A command whose help ends with MMAR's own keys."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Keys of MMAR, next to those of transformers' TrainingArguments"):
            formatter.write_dl(own_keys())


@command(app, cls=TrainCommand, context_settings={"ignore_unknown_options": True})
def train(
    arguments: Annotated[
        list[str] | None,
        Argument(metavar="RECIPE [KEY=VALUE]", help="a YAML file or a shipped recipe's name; values that win over it"),
    ] = None,
    keys: Annotated[bool, Option("--keys", help="Print all keys that a recipe may hold, and exit.")] = False,
) -> None:
    """
    Train an MMAR after a recipe, or go on with a training.

    \b
        mmar train mmar_0_5b_stage1 model=runs/init data=train.parquet output_dir=runs/a
        torchrun --nproc_per_node 8 -m mmar train RECIPE ... shard=trained
        accelerate launch --config_file configs/accelerate/fsdp2.yaml -m mmar train RECIPE ...

    Started again, it goes on from the last complete checkpoint in `output_dir`. The model at the end, with the
    averaged weights, is `output_dir/final`.
    """
    if keys:
        from mmar.training.recipe import describe_keys

        print(describe_keys())
        return
    from mmar.training.train import main

    main(arguments or [])

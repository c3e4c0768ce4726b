"""`mmar train` and `mmar cache-latents`."""

import ast
from pathlib import Path
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
        for node in declared:
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.value.keywords}
                about = ast.literal_eval(given["metadata"])["help"]
                if default := given.get("default", given.get("default_factory")):
                    about += f" (default: {ast.unparse(default).removeprefix('lambda: ')})"
                keys.append((ast.unparse(node.target), about))
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


@command(app)
def cache_latents(
    data: Annotated[str, Argument(metavar="DATA", help="parquet, tar shards, folder of images, or id of a data set")],
    model: Annotated[str, Option(help="folder or repository of an MMAR")],
    out: Annotated[Path, Option(help="folder to write to, or to go on with")],
    num_copies: Annotated[int, Option(help="views per image and kind")] = 0,
    shard_size: Annotated[int, Option(help="rows per file")] = 2048,
    batch_size: Annotated[int, Option(help="images per pass of the VAE")] = 64,
    seed: Annotated[int, Option(help="of the views")] = 0,
    columns: Annotated[
        list[str],
        Option(metavar="KEY=NAME", help="the data's name of one of our columns; may be given several times"),
    ] = [],  # noqa: B006
    split: Annotated[str, Option(help="of a data set")] = "train",
    image_folder: Annotated[
        str | None, Option(help="where relative paths of images start, and what all must lie in")
    ] = None,
    num_workers: Annotated[int, Option(help="processes that open images and draw views")] = 0,
    num_processes: Annotated[
        int | None, Option(help="that encode into this folder; as torchrun says by default")
    ] = None,
    process_index: Annotated[
        int | None, Option(help="which of them this is, from 0; as torchrun says by default")
    ] = None,
) -> None:
    """
    Encode the images of a source once, so that trainings need not.

    \b
        mmar cache-latents train.parquet --model runs/init --out runs/latents --num-copies 3 --num-workers 4
        torchrun --nproc_per_node 8 -m mmar cache-latents train.parquet --model runs/init --out runs/latents

    Started again with the same words, it goes on where it was stopped.
    """
    from mmar.training.latents import main

    main(
        data,
        model,
        out,
        num_copies,
        shard_size,
        batch_size,
        seed,
        columns,
        split,
        image_folder,
        num_workers,
        num_processes,
        process_index,
    )

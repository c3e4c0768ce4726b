"""
Builds the bundled `checkpoints/emoji-lite` data from the full emoji-styles set.

    python -m mmar.training.emoji_lite EMOJI_STYLES_FOLDER [--out checkpoints/emoji-lite]

The lite rows are the animals and the food: 291 names in 7 drawing styles. Held-out cells stay in the test file.
"""

import argparse
import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..command import run_command


COLUMNS = ["image", "captions", "label", "style", "hexcode", "family", "sibling_in_train", "split", "license"]
QUESTIONS = {"caption": "Describe the image.", "name": "What is it?", "style": "Which style?"}
# What the answers to these hang on (views.py).
DEPENDS_ON = ["picture", "content", "style"]


def build(source: Path, out: Path) -> dict[str, int]:
    """
    Writes `train.parquet` and `test.parquet` with the lite rows of `source`.

    Args:
        source (`Path`): Folder with `train-00000-of-00001.parquet`, `test-00000-of-00001.parquet` and `leaks.json`.
        out (`Path`): Folder to write to.

    Returns:
        `dict[str, int]`: The number of rows per split.

    Raises:
        ValueError: If a held-out (name, style) cell also stands in the training rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    leaked = set(json.loads((source / "leaks.json").read_text())["test"])
    cells, rows = {}, {}
    for split in ("train", "test"):
        table = pq.read_table(source / f"{split}-00000-of-00001.parquet")
        table = table.filter(pc.field("lite")).select(COLUMNS)
        if split == "test":
            paths = [image["path"] for image in table.column("image").to_pylist()]
            table = table.filter([path not in leaked for path in paths])
        # Answers to the three questions: caption, name, style.
        answers = [
            [f"an emoji of {label} in {style} style", label, style]
            for label, style in zip(*(table.column(c).to_pylist() for c in ("label", "style")), strict=True)
        ]
        table = table.append_column("questions", [[list(QUESTIONS.values())] * table.num_rows])
        table = table.append_column("answers", [answers])
        table = table.append_column("depends_on", [[DEPENDS_ON] * table.num_rows])
        swaps = [[label, None, None] for label in table.column("label").to_pylist()]
        table = table.append_column("swaps", [swaps])
        cells[split] = set(zip(table.column("label").to_pylist(), table.column("style").to_pylist(), strict=True))
        pq.write_table(table, out / f"{split}.parquet", compression="zstd")
        rows[split] = table.num_rows
    if shared := cells["train"] & cells["test"]:
        raise ValueError(
            f"expected held-out cells to be absent from training; {len(shared)} stand in both, "
            f"for example {sorted(shared)[0]}. Use an unmodified copy of emoji-styles."
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the emoji-styles data set")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/emoji-lite"))
    args = parser.parse_args()
    print(build(args.source, args.out))


if __name__ == "__main__":
    run_command(main)

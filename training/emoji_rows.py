"""
Makes training and test rows of the emoji-styles set, with questions and answers.

    python -m mmar.training.emoji_rows EMOJI_STYLES_FOLDER --out runs/emoji-styles
    python -m mmar.training.emoji_rows EMOJI_STYLES_FOLDER --out checkpoints/emoji-lite --lite

The lite rows, which are bundled, are the animals and the food: 291 names in 7 drawing styles. Held-out cells stay in
the test file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..command import run_command
from ..modeling_mmar.configuration_mmar import shorten
from .rows import BadRow, check_row


COLUMNS = ["image", "captions", "label", "style", "hexcode", "family", "sibling_in_train", "split", "license"]
QUESTIONS = {"caption": "Describe the image.", "name": "What is it?", "style": "Which style?"}
# What the answers to these hang on (views.py).
DEPENDS_ON = ["picture", "content", "style"]


def build(source: Path, out: Path, lite: bool = False) -> dict[str, int]:
    """
    Writes `train.parquet` and `test.parquet` with the rows of `source`.

    Args:
        source (`Path`): Folder with `train-00000-of-00001.parquet`, `test-00000-of-00001.parquet` and `leaks.json`.
        out (`Path`): Folder to write to.
        lite (`bool`, *optional*, defaults to `False`): Only animals and food.

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
        table = table.filter(pc.field("lite") if lite else pc.scalar(True)).select(COLUMNS)
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
        # A name that also stands elsewhere in its caption, as "pen" in "openmoji", is not swapped.
        swaps = [
            [label if caption.count(label) == 1 else None, None, None]
            for label, (caption, *_) in zip(table.column("label").to_pylist(), answers, strict=True)
        ]
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


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    r"""
    Reads all rows of such a file, with all their columns.

    Args:
        path (`str` or `Path`): Parquet with the columns image {bytes, path}, captions, questions and answers.

    Returns:
        `list[dict]`: The rows; `image` holds the file's bytes.

    Raises:
        ValueError: If it is no such file, has no rows, or a row is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a parquet file; there is none at {shorten(str(path))}. Check the path.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"expected a parquet file at {shorten(str(path))}; it cannot be read ({shorten(error)})."
        ) from error
    if missing := {"image", "captions", "questions", "answers"} - set(table.column_names):
        raise ValueError(
            f"{path.name} must have the columns image, captions, questions and answers; missing: "
            f"{', '.join(sorted(missing))}. `python -m mmar.training.emoji_rows` makes such files."
        )
    rows = table.to_pylist()
    if not rows:
        raise ValueError(f"{path.name} must have at least one row; got none.")
    read = []
    for index, row in enumerate(rows):
        image = row["image"]
        row = {**row, "image": image.get("bytes") if isinstance(image, dict) else image}
        try:
            read.append(check_row(row, f"row {index} of {path.name}"))
        except BadRow as error:
            raise ValueError(str(error)) from error
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the emoji-styles data set")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--lite", action="store_true", help="only animals and food")
    args = parser.parse_args()
    print(build(args.source, args.out, args.lite))


if __name__ == "__main__":
    run_command(main)

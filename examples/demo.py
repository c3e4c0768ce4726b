"""
Draws and describes emoji with the bundled mmar-tiny.

    python examples/demo.py [--out demo_output] [--seed 0]

Needs nothing but this repository and two minutes on two cores.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmar.conversion.models import open_pipeline
from mmar.evaluation.emoji_styles import ask
from mmar.training.emoji_rows import read_rows


ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "mmar-tiny"
DATA = ROOT / "checkpoints" / "emoji-lite"
NUM_PICTURES = 16
CELL, LINE_HEIGHT, LINE_LENGTH, MAX_LINES = 128, 12, 22, 5


def sheet(pictures: list[Image.Image], captions: list[str], columns: int) -> Image.Image:
    """Pictures in a grid, with lines of text below each."""
    rows = -(-len(pictures) // columns)
    wrapped = [textwrap.wrap(caption, LINE_LENGTH)[:MAX_LINES] for caption in captions]
    caption_height = LINE_HEIGHT * max(map(len, wrapped), default=1) + 6
    page = Image.new("RGB", (columns * (CELL + 8), rows * (CELL + caption_height + 8)), "white")
    pen = ImageDraw.Draw(page)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        left, top = (i % columns) * (CELL + 8) + 4, (i // columns) * (CELL + caption_height + 8) + 4
        page.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text((left + 2, top + CELL + 2), "\n".join(lines), fill="black", spacing=1)
    return page


def pick(rows: list[dict], count: int) -> list[dict]:
    """Rows spread over the file, so that styles and names vary."""
    return [rows[i * len(rows) // count] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo_output")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    if not CHECKPOINT.is_dir():
        parser.exit(1, f"{CHECKPOINT.relative_to(ROOT)} is not there; `make train-tiny` trains it.\n")
    pipe = open_pipeline(CHECKPOINT)
    seen, unseen = read_rows(DATA / "train.parquet"), read_rows(DATA / "test.parquet")

    chosen = pick(unseen, NUM_PICTURES * 3 // 4) + pick(seen, NUM_PICTURES // 4)
    names = [f"{row['label']}, {row['style']}" for row in chosen]
    prompts = [row["captions"][0] for row in chosen]
    num_new = NUM_PICTURES * 3 // 4
    print(f"Drawing {len(prompts)} emoji. Training never saw the first {num_new} pairs of name and style.")
    images = pipe(prompts, generator=torch.Generator().manual_seed(args.seed)).images
    drawn_file = args.out / "drawn.png"
    sheet(images, names, columns=4).save(drawn_file)

    print("\nDescribing 12 real pictures never seen in training:")
    tested = pick(unseen, 12)
    pictures = pipe.processor.image_processor.fetch_images([row["image"] for row in tested], places=False)
    answers = ask(pipe, pictures, "Describe the image.")
    right, described = {"name": 0, "style": 0, "both": 0}, []
    for row, answer in zip(tested, answers, strict=True):
        expected = row["answers"][0]
        found = {"name": f" of {row['label']} in " in answer, "style": answer.endswith(f" in {row['style']} style")}
        found["both"] = answer == expected
        right = {key: right[key] + found[key] for key in right}
        words = [key for key in ("name", "style") if found[key]]
        mark = "right" if found["both"] else f"{words[0]} right" if words else "wrong"
        print(f"  {mark:<12}{answer}" + ("" if found["both"] else f"   (it is {expected})"))
        said = answer.removeprefix("an emoji of ")
        described.append(f"{mark}: {said}" + ("" if found["both"] else f"; it is {row['label']}, {row['style']}"))
    described_file = args.out / "described.png"
    sheet(pictures, described, columns=4).save(described_file)

    print(
        f"\nOf {len(tested)} descriptions {right['name']} had the right name, {right['style']} the right style, "
        f"{right['both']} both."
    )
    named = ask(pipe, images, "What is it?")
    same = sum(name == row["label"] for name, row in zip(named, chosen, strict=True))
    print(f"Asked to name its own drawings, the model named {same} of {len(chosen)} as what it was asked to draw.")
    print(f"Drawings: {drawn_file}\nReal pictures with their descriptions: {described_file}")


if __name__ == "__main__":
    main()

"""
Fashion-MNIST as a second set for the experiments: rows with questions and answers, and a judge of drawings.

    python -m mmar.ablations.fashion rows FASHION_MNIST_FOLDER --out runs/fashion --num_rows 12000 --num_test 300
    python -m mmar.ablations.fashion judge --data runs/fashion/train.parquet --out runs/fashion/judge.safetensors
    python -m mmar.ablations.fashion score PICTURES --judge runs/fashion/judge.safetensors \
        --reference runs/fashion/test.parquet

A picture's name is its class and its style its shade, dark, grey or bright, which follows from its pixels. Rows have
the pictures as drawings on white, like emoji: inverted, with 2 white pixels around, 32 x 32; the judge undoes that. It
is a small CNN trained on the training rows; `score` prints what emoji-styles' judge prints. Views (views.py) change
lightness, and so the shade: train without, `--num_copies 0`.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..command import run_command
from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.saving_mmar import apply_umask
from ..processors.image_processing_mmar import read_rgb_image
from ..training.emoji_rows import DEPENDS_ON
from ..training.rows import open_cell


QUESTIONS = ["Describe the image.", "What is it?", "Which shade?"]
SIZE, BORDER = 28, 2
# The data set's definition of a shade: the mean of pixels above this, and where grey begins and ends.
FOREGROUND, SHADE_BOUNDS = 20, (142.0, 182.4)
SHADES = ("dark", "grey", "bright")
NUM_FEATURES, BATCH_SIZE, LEARNING_RATE = 128, 128, 2.0e-3
NUM_BEST = 5


def build(source: Path, out: Path, num_rows: int | None, num_test: int) -> dict[str, int]:
    """
    Writes `train.parquet`, the first `num_rows` of the training rows, `test.parquet`, and `test_small.parquet` with
    `num_test` rows spread over it, to answer and to draw; returns their lengths.

    Raises:
        ValueError: If the data set is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lengths = {}
    for split in ("train", "test"):
        file = source / f"{split}-00000-of-00001.parquet"
        if not file.is_file():
            raise ValueError(f"expected {file.name} of Fashion-MNIST in {shorten(str(source))}; it is not there.")
        rows = pq.read_table(file).to_pylist()
        built = [
            {
                "image": {"bytes": on_white(row["image"]["bytes"]), "path": row["image"]["path"]},
                "captions": [row["captions"][-1]],
                "label": row["label_name"],
                "style": row["shade"],
                "split": row["split"],
                "license": row["license"],
                "questions": QUESTIONS,
                # The wording with words behind the name, which another can then take the place of.
                "answers": [row["captions"][-1], row["label_name"], row["shade"]],
                "depends_on": DEPENDS_ON,
                "swaps": [row["label_name"], None, None],
            }
            for row in (rows[:num_rows] if split == "train" else rows)
        ]
        if num_test > len(built):
            raise ValueError(f"--num_test must be at most {len(built)}, the rows of {file.name}; got {num_test}.")
        spread = [built[index * len(built) // num_test] for index in range(num_test)]
        for name, kept in ((split, built), *([("test_small", spread)] if split == "test" else [])):
            pq.write_table(pa.Table.from_pylist(kept), out / f"{name}.parquet", compression="zstd")
            lengths[name] = len(kept)
    return lengths


class FashionJudge(nn.Module):
    """Grey pictures `(B, 1, 28, 28)` in [0, 1] -> logits of the classes `(B, 10)` and features `(B, 128)`."""

    def __init__(self, num_names: int):
        super().__init__()
        widths = (1, 32, 64, NUM_FEATURES)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in zip(widths[:-1], widths[1:], strict=True)
            )
        )
        self.head = nn.Linear(NUM_FEATURES, num_names)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(pictures).mean((2, 3))
        return self.head(features), features


def on_white(content: bytes) -> bytes:
    """A picture's file, grey on black, as one of 32 x 32 pixels, inverted, on white."""
    grey = np.asarray(read_rgb_image(content, places=False).convert("L"))
    if grey.shape != (SIZE, SIZE):
        raise ValueError(f"expected pictures of {SIZE} x {SIZE} pixels; got {grey.shape[1]} x {grey.shape[0]}.")
    buffer = io.BytesIO()
    Image.fromarray(np.pad(255 - grey, BORDER, constant_values=255)).save(buffer, "PNG")
    return buffer.getvalue()


def to_grey(image: Image.Image) -> np.ndarray:
    """A picture of a row, or a drawing like it, as `(28, 28)` bytes, grey on black."""
    whole = SIZE + 2 * BORDER
    if image.size != (whole, whole):
        raise ValueError(f"expected pictures of {whole} x {whole} pixels; got {image.width} x {image.height}.")
    return 255 - np.asarray(image.convert("L"))[BORDER:-BORDER, BORDER:-BORDER]


def read_parquet(path: Path) -> tuple[Tensor, list[str]]:
    """Pictures `(N, 1, 28, 28)` in [0, 1], and their names."""
    if not path.is_file():
        raise ValueError(f"expected a parquet of rows; there is none at {shorten(str(path))}. `rows` writes them.")
    table = pq.read_table(path, columns=["image", "label"])
    pictures = [
        to_grey(open_cell(image, path.parent, f"row {index} of {path.name}"))
        for index, image in enumerate(table.column("image").to_pylist())
    ]
    return torch.from_numpy(np.stack(pictures))[:, None].float() / 255, table.column("label").to_pylist()


def train_judge(pictures: Tensor, labels: Tensor, num_names: int, num_epochs: int, seed: int) -> FashionJudge:
    """A judge that learned pictures `(N, 1, 28, 28)` and the numbers of their names `(N,)`, shifted by up to 2."""
    if len(pictures) < BATCH_SIZE:
        raise ValueError(f"expected at least {BATCH_SIZE} training rows for a judge; got {len(pictures)}.")
    torch.manual_seed(seed)
    generator, judge = torch.Generator().manual_seed(seed), FashionJudge(num_names).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    num_steps = num_epochs * (len(pictures) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    padded = F.pad(pictures, (2, 2, 2, 2))
    for _ in range(num_epochs):
        for index in torch.randperm(len(pictures), generator=generator).split(BATCH_SIZE)[: num_steps // num_epochs]:
            top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
            logits, _ = judge(padded[index, :, top : top + SIZE, left : left + SIZE])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[index]).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def shade_of(picture: np.ndarray) -> str:
    """The shade of a picture `(28, 28)` of bytes; one without a foreground is dark."""
    foreground = picture[picture > FOREGROUND]
    mean = float(foreground.mean()) if len(foreground) else 0.0
    return SHADES[sum(mean >= bound for bound in SHADE_BOUNDS)]


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Between normal distributions with the means and covariances of `(N, D)` and `(M, D)`, in float64."""
    a, b = features.double(), others.double()
    difference, cov_a, cov_b = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    # trace((A B)^0.5) by the root of A and a symmetric product.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


@torch.no_grad()
def score(folder: Path, weights: Path, reference: Path) -> dict[str, Any]:
    r"""
    Scores drawings.

    Args:
        folder (`Path`): Pictures, and `captions.jsonl` with their file, label and style.
        weights (`Path`): As `judge` writes it, with the names beside it.
        reference (`Path`): Parquet of real pictures.

    Returns:
        `dict`: n, `name_top1`, `name_top5` and `style` as shares, `frechet`, and `frechet_real`: what the second
        half of the reference has against the first, cut to n pictures.

    Raises:
        ValueError: If something is not there.
    """
    for path in (folder / "captions.jsonl", weights, weights.with_suffix(".json")):
        if not path.is_file():
            raise ValueError(f"expected {path.name} in {shorten(str(path.parent))}; it is not there.")
    names = json.loads(weights.with_suffix(".json").read_text())
    judge = FashionJudge(len(names)).eval()
    judge.load_state_dict(load_file(weights))
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    drawn = np.stack(
        [to_grey(open_cell(line["file"], folder, f"line {i} of captions.jsonl")) for i, line in enumerate(lines)]
    )
    real, _ = read_parquet(reference)
    logits, features = judge(torch.from_numpy(drawn)[:, None].float() / 255)
    if unknown := sorted({line["label"] for line in lines} - set(names)):
        raise ValueError(f"expected names that the judge learned, {', '.join(names)}; got {', '.join(unknown)}.")
    asked = torch.tensor([names.index(line["label"]) for line in lines])[:, None]
    best = logits.topk(min(NUM_BEST, len(names))).indices
    real_features = torch.cat([judge(part)[1] for part in real.split(512)])
    first, second = real_features[: len(real) // 2], real_features[len(real) // 2 :]
    return {
        "n": len(lines),
        "name_top1": float((best[:, :1] == asked).float().mean()),
        "name_top5": float((best == asked).any(-1).float().mean()),
        "style": float(np.mean([shade_of(p) == line["style"] for p, line in zip(drawn, lines, strict=True)])),
        "frechet": frechet_distance(features, first),
        "frechet_real": frechet_distance(second[: len(lines)], first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("source", type=Path, help="folder of Fashion-MNIST with captions")
    rows.add_argument("--out", required=True, type=Path)
    rows.add_argument("--num_rows", type=int, help="of the training rows; all by default")
    rows.add_argument("--num_test", type=int, default=300, help="of test_small.parquet")
    judge = commands.add_parser("judge")
    judge.add_argument("--data", required=True, type=Path, help="parquet of training rows")
    judge.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    judge.add_argument("--num_epochs", type=int, default=8)
    judge.add_argument("--seed", type=int, default=0)
    of_score = commands.add_parser("score")
    of_score.add_argument("folder", type=Path, help="drawings with their captions.jsonl")
    of_score.add_argument("--judge", required=True, type=Path)
    of_score.add_argument("--reference", required=True, type=Path, help="parquet of real pictures")
    args = parser.parse_args()
    if args.command == "rows":
        if args.num_test < 1 or (args.num_rows is not None and args.num_rows < 1):
            parser.error("--num_rows and --num_test must be at least 1")
        print(json.dumps(build(args.source, args.out, args.num_rows, args.num_test)))
    elif args.command == "judge":
        if args.num_epochs < 1:
            parser.error(f"--num_epochs must be at least 1; got {args.num_epochs}")
        pictures, labels = read_parquet(args.data)
        names = sorted(set(labels))
        numbers = torch.tensor([names.index(label) for label in labels])
        trained = train_judge(pictures, numbers, len(names), args.num_epochs, args.seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(names))
        # Last, and whole: it is what tells that there is a judge.
        partial = args.out.with_suffix(".partial")
        save_file(trained.state_dict(), partial)
        partial.replace(args.out)
        apply_umask(args.out.parent)
        print(json.dumps({"names": len(names), "pictures": len(pictures)}))
    else:
        print(json.dumps(score(args.folder, args.judge, args.reference)))


if __name__ == "__main__":
    run_command(main)

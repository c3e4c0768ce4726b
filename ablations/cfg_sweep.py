"""
How strong guidance may be (Fig. 8, suppl. Sec. 6.5): drawings of a trained model at scales from 1 to 20.

    python -m mmar.ablations.cfg_sweep checkpoints/mmar-tiny --data checkpoints/emoji-lite/test.parquet \\
        --judge JUDGE.py --work runs/cfg --out docs/results

Paper: FID gets better up to a scale of 10, where most models have their best between 1.5 and 5. Each drawing and
judgement is kept under --work; started again, it goes on after the last.
"""

import argparse
import json
from pathlib import Path

from ..command import run_command
from ..conversion.models import open_pipeline
from ..evaluation.judging import claim, folder_of, run
from ..training.emoji_rows import read_rows
from .study import STUDENT, cell, check_plots, plot_path, plot_spread, table, told, write_page


SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0)
COLUMNS = {
    "name_top1": "drawings named",
    "name_top5": "among the first five",
    "style": "in style",
    "frechet": "Frechet",
}


def plot(figures: dict[float, list[dict[str, float]]], file: Path) -> None:
    """Frechet distance and drawings named against the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    labels = {"frechet": "Frechet", "name_top1": "drawings named, %"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        plot_spread(axes, figures, key, None)
        axes.set(xlabel="guidance scale", ylabel=label)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained MMAR")
    parser.add_argument("--data", required=True, type=Path, help="parquet of held-out rows")
    parser.add_argument("--judge", required=True, type=Path, help="script that scores a folder of drawings")
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps the drawings")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the page and the plot to")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--num_rows", type=int, help="so many rows, spread over the file; all by default")
    args = parser.parse_args()
    rows = read_rows(args.data)
    if args.num_rows is not None:
        if not 1 <= args.num_rows <= len(rows):
            parser.error(f"--num_rows must be between 1 and {len(rows)}, the rows of {args.data.name}")
        rows = [rows[index * len(rows) // args.num_rows] for index in range(args.num_rows)]
    if not 1 <= args.seeds <= len(STUDENT) + 1:
        parser.error(f"--seeds must be between 1 and {len(STUDENT) + 1}; got {args.seeds}")
    if not args.judge.is_file():
        parser.error(f"--judge must be a script; {args.judge} is not there")
    check_plots(args.out)
    pipe, figures = open_pipeline(args.model), {}
    args.work.mkdir(parents=True, exist_ok=True)
    claim(args.work, pipe, rows)
    for seed in range(args.seeds):
        for scale in SCALES:
            arguments = {"guidance_scale": scale, "preset": "paper"}
            folder = folder_of(args.work, args.judge, pipe.scheduler, seed, arguments)
            # A picture's noise hangs on the sum of seed and row: none is drawn with another's.
            outcome = run(pipe, rows, args.judge, folder, seed * len(rows), arguments)
            figures.setdefault(scale, []).append(outcome)
            print(json.dumps({"scale": scale, "seed": seed, **outcome}), flush=True)
    picture = plot_path(args.out, "cfg_sweep")
    plot(figures, picture)
    lines = [[scale, *(cell(runs, key) for key in COLUMNS)] for scale, runs in figures.items()]
    body = f"""
{len(rows)} held-out captions, `preset="paper"`; mean and half of Student's 95 % interval over {args.seeds} seeds of
the drawings.

{table(["guidance scale", *COLUMNS.values()], lines)}

![]({picture.name})
"""
    title = "Guidance from 1 to 20"
    write_page(args.out, "cfg_sweep", title, told("mmar.ablations.cfg_sweep", args, "model"), body)


if __name__ == "__main__":
    run_command(main)

"""
Which noise level a Transfusion-like model reads pictures best at (Fig. 7, suppl. of v1, A.8).

    python -m mmar.ablations.noise_levels --config ablations/configs/emoji \\
        --data checkpoints/emoji-lite/train.parquet --test checkpoints/emoji-lite/test.parquet --vae runs/vae \\
        --judge JUDGE.py --work runs/table3 --out docs/results

The trained models are those of `table3` in the same --work. Paper: most tasks are best at a level above 0, and
localization gets better with noise.
"""

import argparse
import json
from pathlib import Path

import torch

from ..command import run_command
from ..training.emoji_rows import read_rows
from .study import (
    Trial,
    add_arguments,
    cell,
    open_pipeline,
    open_study,
    plot_path,
    plot_spread,
    table,
    told,
    write_figures,
    write_page,
)


LEVELS = (0, 125, 250, 375, 500, 750)  # v1, A.8
COLUMNS = {"caption": "captions", "name": "names", "style": "styles", "name_loss": "nats per name"}


def plot(figures: dict[int, list[dict[str, float]]], file: Path) -> None:
    """Shares answered exactly, and nats per name, against the level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, nats = figure.subplots(1, 2)
    for key, label in COLUMNS.items():
        plot_spread(nats if key == "name_loss" else shares, figures, key, label)
    shares.set(xlabel="noise level of the picture", ylabel="answered exactly, %")
    shares.legend()
    nats.set(xlabel="noise level of the picture", ylabel=COLUMNS["name_loss"])
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study, figures, rows = open_study(args), {}, read_rows(args.test)
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    for seed in range(args.seeds):
        trial = Trial("transfusion", seed, settings)
        pipe = open_pipeline(study.final_of(trial))
        for level in LEVELS:
            file = study.folder_of(trial) / f"understanding_{level}.json"
            if not file.is_file():
                pipe.model.config.understanding_level = level
                # The same noise at each level.
                torch.manual_seed(seed)
                write_figures(file, study.understand(pipe, rows))
            outcome = json.loads(file.read_text())
            figures.setdefault(level, []).append(outcome)
            print(json.dumps({"level": level, "seed": seed, **outcome}), flush=True)
    name = f"noise_levels_{args.config.name}"
    picture = plot_path(args.out, name)
    plot(figures, picture)
    lines = [[level, *(cell(runs, key) for key in COLUMNS)] for level, runs in figures.items()]
    body = f"""
Held-out rows answered exactly by the Transfusion-like model whose pictures carry noise of a level; trained on levels 0
to 500. Nats per name: the mean negative log-probability of the name as the beginning of the answer. Mean and half of
Student's 95 % interval over {args.seeds} seeds.

{table(["level", *COLUMNS.values()], lines)}

![]({picture.name})
"""
    title = "Noise levels at which the Transfusion-like model reads"
    write_page(args.out, name, title, told("mmar.ablations.noise_levels", args), body)


if __name__ == "__main__":
    run_command(main)

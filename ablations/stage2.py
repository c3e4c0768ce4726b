"""
What the second stage's mask ratio does (Sec. 3.3.3, Fig. 5): ratios in [0.7, 1] throughout, or in (0, 1] at the end.

    python -m mmar.ablations.stage2 --config ablations/configs/emoji --data checkpoints/emoji-lite/train.parquet \\
        --test checkpoints/emoji-lite/test.parquet --vae runs/vae --judge JUDGE.py --work runs/table3 \\
        --out docs/results

Both go on from the same first stage, with equal steps. Paper: with [0.7, 1] alone the tokens are not coherent, where
the data are too many to be seen often.
"""

import argparse
import json

from ..command import run_command
from .study import LABELS, Trial, add_arguments, cell, open_study, plot_bars, plot_path, table, told, write_page


STAGE1_MIN = 0.7
COLUMNS = ("name_top1", "style_drawn", "frechet", "name", "name_loss")
WAYS = {"first stage alone": None, "goes on in [0.7, 1]": STAGE1_MIN, "second stage in (0, 1]": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study, figures = open_study(args), {}
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    for seed in range(args.seeds):
        first = Trial("mmar", seed, {**settings, "mask_ratio_min": STAGE1_MIN})
        for way, least in WAYS.items():
            again = {**settings, "mask_ratio_min": least}
            outcome = study.run(first if least is None else Trial("mmar", seed, again, start=first))
            figures.setdefault(way, []).append(outcome)
            print(json.dumps({"way": way, "seed": seed, **outcome}), flush=True)
    name = f"stage2_{args.config.name}"
    picture = plot_path(args.out, name)
    plot_bars(figures, ("name_top1", "frechet"), picture)
    lines = [[way, *(cell(runs, key) for key in COLUMNS)] for way, runs in figures.items()]
    body = f"""
Mean and half of Student's 95 % interval over {args.seeds} seeds.

{table(["training", *(LABELS[key] for key in COLUMNS)], lines)}

![]({picture.name})
"""
    write_page(args.out, name, "The second stage's mask ratio", told("mmar.ablations.stage2", args), body)


if __name__ == "__main__":
    run_command(main)

"""
Table 3 in small: MMAR, epsilon, VQ and the Transfusion-like model with equal data, steps and trained weights.

    python -m mmar.ablations.table3 --config ablations/configs/emoji --data checkpoints/emoji-lite/train.parquet \\
        --test checkpoints/emoji-lite/test.parquet --vae runs/vae --vq runs/vq --judge JUDGE.py \\
        --work runs/table3 --out docs/results

Understanding is the share of names that are answered exactly and the negative log-probability of the names, generation
the judge's Frechet distance and the share of drawings that it names as asked. Stopped and started again, it goes on
where it was.
"""

import argparse
import itertools
import json
import statistics

from ..command import run_command
from .study import (
    LABELS,
    Trial,
    add_arguments,
    cell,
    interval,
    open_study,
    plot_bars,
    plot_path,
    table,
    told,
    write_page,
)
from .systems import SYSTEMS


# AVE@18 and FID-30K of Table 3.
PAPER = {"mmar": (34.56, 36.6), "epsilon": (32.21, 61.53), "vq": (29.70, 66.26), "transfusion": (28.26, 95.38)}
# What the image losses are of: they are not to be compared.
TARGETS = {"mmar": "v", "epsilon": "noise", "vq": "codes, in nats", "transfusion": "noise"}
PLOTTED = ("name", "name_loss", "style", "name_top1", "frechet")
LESS_IS_BETTER = ("name_loss", "frechet")


def order(figures: dict[str, list[dict[str, float]]], key: str) -> str:
    """The systems from the best mean on, with "≈" between two whose intervals overlap."""
    ranges = {system: interval([own[key] for own in runs]) for system, runs in figures.items()}
    best_first = sorted(ranges, key=lambda system: ranges[system][0], reverse=key not in LESS_IS_BETTER)
    text = best_first[0]
    for before, system in itertools.pairwise(best_first):
        (mean, half), (other, other_half) = ranges[before], ranges[system]
        # One seed has no interval, and tells no two apart.
        text += f" {'>' if abs(mean - other) > half + other_half else '≈'} {system}"
    return text


def report(figures: dict[str, list[dict[str, float]]], picture: str, study_name: str) -> str:
    """The body of the page."""
    lines = []
    for system, runs in figures.items():
        cells = [cell(runs, key) for key in LABELS]
        loss = f"{statistics.mean(own['image_loss'] for own in runs):.3f}, {TARGETS[system]}"
        lines.append([SYSTEMS[system], *cells, loss, *PAPER[system]])
    head = ["system", *LABELS.values(), "last image loss, of", "paper: AVE@18", "paper: FID-30K"]
    understood = " > ".join(sorted(figures, key=lambda system: PAPER[system][0], reverse=True))
    drawn = " > ".join(sorted(figures, key=lambda system: PAPER[system][1]))
    number = len(next(iter(figures.values())))
    real = statistics.mean(own["frechet_real"] for runs in figures.values() for own in runs)
    return f"""
Data: {study_name}. Mean and half of Student's 95 % interval over {number} seeds. Nats per name: the mean negative
log-probability of a held-out picture's name as the beginning of the answer. The paper's columns are its own figures at
0.5B, not to be mixed with ours. Between as many real pictures the Frechet distance is {real:.1f}.

{table(head, lines)}

Order, the paper's and ours; "≈" stands between two whose intervals overlap:

* understanding, paper: {understood}
  * by names answered: {order(figures, "name")}
  * by nats per name: {order(figures, "name_loss")}
  * by styles answered: {order(figures, "style")}
* generation, paper: {drawn}
  * by Frechet distance: {order(figures, "frechet")}

![]({picture})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    args = parser.parse_args()
    if len(set(args.systems)) < len(args.systems):
        parser.error(f"--systems must be different ones; got {' '.join(args.systems)}")
    study, figures = open_study(args), {}
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    for system in args.systems:
        study.config_of(Trial(system, 0))  # what is wrong with the last one shows before the first is trained
    # Seed by seed, so that a study that is stopped has compared something.
    for seed in range(args.seeds):
        for system in args.systems:
            outcome = study.run(Trial(system, seed, settings))
            figures.setdefault(system, []).append(outcome)
            print(json.dumps({"system": system, "seed": seed, **outcome}), flush=True)
    name = f"table3_{args.config.name}"
    picture = plot_path(args.out, name)
    plot_bars(figures, PLOTTED, picture)
    body = report(figures, picture.name, f"{args.data.parent.name}, {args.config.name}")
    write_page(args.out, name, "Table 3 in small", told("mmar.ablations.table3", args), body)


if __name__ == "__main__":
    run_command(main)

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
from pathlib import Path

from ..command import run_command
from .study import Trial, add_arguments, cell, interval, open_study, plot_path, table, told, write_page
from .systems import SYSTEMS


# AVE@18 and FID-30K of Table 3.
PAPER = {"mmar": (34.56, 36.6), "epsilon": (32.21, 61.53), "vq": (29.70, 66.26), "transfusion": (28.26, 95.38)}
# What the image losses are of: they are not to be compared.
TARGETS = {"mmar": "v", "epsilon": "noise", "vq": "codes, in nats", "transfusion": "noise"}
COLUMNS = {
    "name": "names answered",
    "name_loss": "nats per name",
    "style": "styles answered",
    "name_top1": "drawings named",
    "style_drawn": "drawings in style",
    "frechet": "Frechet",
}


def order(means: dict[str, float], is_less_better: bool) -> str:
    """The systems from the best on; those that are as good joined by "="."""
    best_first = sorted(means, key=means.get, reverse=not is_less_better)
    text = best_first[0]
    for before, system in itertools.pairwise(best_first):
        text += f" {'=' if means[before] == means[system] else '>'} {system}"
    return text


def plot(figures: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Understanding and generation of each system, with Student's intervals over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    shown = (
        ("name", 100, "names answered, %"),
        ("name_loss", 1, "nats per name"),
        ("name_top1", 100, "drawings named, %"),
        ("frechet", 1, "Frechet"),
    )
    for axes, (key, factor, label) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        means, halves = zip(*(interval([own[key] for own in runs]) for runs in figures.values()), strict=True)
        axes.bar(list(figures), [factor * mean for mean in means], yerr=[factor * half for half in halves], capsize=4)
        axes.set(title=label)
        axes.tick_params(axis="x", rotation=20)
    figure.savefig(file)


def report(figures: dict[str, list[dict[str, float]]], picture: str, study_name: str) -> str:
    """The body of the page."""
    lines = []
    for system, runs in figures.items():
        cells = [cell(runs, key) for key in COLUMNS]
        loss = f"{statistics.mean(own['image_loss'] for own in runs):.3f}, {TARGETS[system]}"
        lines.append([SYSTEMS[system], *cells, loss, *PAPER[system]])
    head = ["system", *COLUMNS.values(), "last image loss, of", "paper: AVE@18", "paper: FID-30K"]
    means = {
        key: {system: statistics.mean(own[key] for own in runs) for system, runs in figures.items()}
        for key in ("name", "name_loss", "style", "frechet")
    }
    understood = {system: paper[0] for system, paper in PAPER.items() if system in figures}
    drawn = {system: paper[1] for system, paper in PAPER.items() if system in figures}
    number = len(next(iter(figures.values())))
    real = statistics.mean(own["frechet_real"] for runs in figures.values() for own in runs)
    return f"""
Data: {study_name}. Mean and half of Student's 95 % interval over {number} seeds. Nats per name: the mean negative
log-probability of a held-out picture's name as the answer. The paper's columns are its own figures at 0.5B, not to be
mixed with ours. Between as many real pictures the Frechet distance is {real:.1f}.

{table(head, lines)}

Order, ours and the paper's:

* understanding, paper: {order(understood, False)}
  * by names answered: {order(means["name"], False)}
  * by nats per name: {order(means["name_loss"], True)}
  * by styles answered: {order(means["style"], False)}
* generation, paper: {order(drawn, True)}
  * by Frechet distance: {order(means["frechet"], True)}

![]({picture})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    args = parser.parse_args()
    study, figures = open_study(args), {}
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    # Seed by seed, so that a study that is stopped has compared something.
    for seed in range(args.seeds):
        for system in args.systems:
            outcome = study.run(Trial(system, seed, settings))
            figures.setdefault(system, []).append(outcome)
            print(json.dumps({"system": system, "seed": seed, **outcome}), flush=True)
    name = f"table3_{args.config.name}"
    picture = plot_path(args.out, name)
    plot(figures, picture)
    body = report(figures, picture.name, f"{args.data.parent.name}, {args.config.name}")
    write_page(args.out, name, "Table 3 in small", told("mmar.ablations.table3", args), body)


if __name__ == "__main__":
    run_command(main)

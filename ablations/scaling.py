"""
More data and larger models, in small (Fig. 3 C, Sec. 4.3): answers and drawings of MMAR on held-out rows.

    python -m mmar.ablations.scaling --config ablations/configs/emoji --data checkpoints/emoji-lite/train.parquet \\
        --test checkpoints/emoji-lite/test.parquet --vae runs/vae --judge JUDGE.py --work runs/scaling \\
        --out docs/results

The data are a quarter, a half and all of the training rows with equal steps; the models are three widths and depths
with all rows. Paper: understanding rises with the samples seen, without saturation, and from 0.5B to 7B.
"""

import argparse
import json
from pathlib import Path

from ..command import run_command
from .study import Trial, add_arguments, cell, interval, open_study, plot_path, table, told, write_page


SHARES = (0.25, 0.5, 1.0)
# Entries of the base config; heads keep their width.
SIZES = {
    "small": {
        "text_config.hidden_size": 96,
        "text_config.num_attention_heads": 2,
        "text_config.num_key_value_heads": 1,
        "text_config.intermediate_size": 256,
        "text_config.num_hidden_layers": 3,
        "vit_config.hidden_size": 64,
        "diffusion_config.hidden_size": 64,
    },
    "base": {},
    "large": {
        "text_config.hidden_size": 288,
        "text_config.num_attention_heads": 6,
        "text_config.num_key_value_heads": 3,
        "text_config.intermediate_size": 768,
        "text_config.num_hidden_layers": 6,
        "vit_config.hidden_size": 192,
        "diffusion_config.hidden_size": 192,
    },
}
COLUMNS = {"name": "names answered", "style": "styles answered", "name_top1": "drawings named", "frechet": "Frechet"}


def plot(by_share: dict[float, list[dict]], by_size: dict[str, list[dict]], file: Path) -> None:
    """Names answered and drawings named, against data and against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (label, runs) in zip(
        figure.subplots(1, 2, sharey=True), (("share of the rows", by_share), ("model", by_size)), strict=True
    ):
        for key, text in (("name", "names answered"), ("name_top1", "drawings named")):
            means, halves = zip(*(interval([own[key] for own in outcomes]) for outcomes in runs.values()), strict=True)
            places = [str(place) for place in runs]
            axes.errorbar(
                places, [100 * m for m in means], [100 * h for h in halves], marker="o", capsize=4, label=text
            )
        axes.set(xlabel=label, ylabel="%")
        axes.legend()
    figure.savefig(file)


def lines_of(runs: dict) -> list[list[str]]:
    return [
        [str(place), *(cell([own[key] for own in outcomes], key != "frechet") for key in COLUMNS)]
        for place, outcomes in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study, by_share, by_size = open_study(args), {}, {}
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    trials = [
        (by_share, share, lambda seed, share=share: Trial("mmar", seed, settings, share=share)) for share in SHARES
    ]
    trials += [
        (by_size, size, lambda seed, base=base: Trial("mmar", seed, settings, base)) for size, base in SIZES.items()
    ]
    for seed in range(args.seeds):
        for runs, place, make in trials:
            outcome = study.run(make(seed))
            runs.setdefault(place, []).append(outcome)
            print(json.dumps({"at": place, "seed": seed, **outcome}), flush=True)
    name = f"scaling_{args.config.name}"
    picture = plot_path(args.out, name)
    plot(by_share, by_size, picture)
    body = f"""
Mean and half of Student's 95 % interval over {args.seeds} seeds.

{table(["share of the rows", *COLUMNS.values()], lines_of(by_share))}

{table(["model", *COLUMNS.values()], lines_of(by_size))}

![]({picture.name})
"""
    write_page(args.out, name, "Data and model scaling in small", told("mmar.ablations.scaling", args), body)


if __name__ == "__main__":
    run_command(main)

"""
More data and larger models, in small (Fig. 3 C, Sec. 4.3): answers and drawings of MMAR on held-out rows.

    python -m mmar.ablations.scaling --config ablations/configs/emoji --data checkpoints/emoji-lite/train.parquet \\
        --test checkpoints/emoji-lite/test.parquet --vae runs/vae --judge JUDGE.py --work runs/scaling \\
        --out docs/results

Three things are varied, each from the base trial: the steps, and so the samples seen, a quarter, a half and all of
them (the paper's axis); the training rows, a quarter, a half and all of them with equal steps; and the model's widths,
a quarter, a half and all of them. Paper: understanding rises with the samples seen, without saturation, and from 0.5B
to 7B.
"""

import argparse
import json
from pathlib import Path

from ..command import run_command
from .study import (
    LABELS,
    Trial,
    add_arguments,
    cell,
    open_study,
    plot_path,
    plot_spread,
    recipe_steps,
    table,
    told,
    write_page,
)
from .systems import num_trained


SHARES = (0.25, 0.5, 1.0)
# Entries of the base config that are widths or numbers of heads, so that a head keeps its width.
WIDTHS = (
    "text_config.hidden_size",
    "text_config.num_attention_heads",
    "text_config.num_key_value_heads",
    "text_config.intermediate_size",
    "vit_config.hidden_size",
    "vit_config.num_attention_heads",
    "diffusion_config.hidden_size",
)
COLUMNS = ("name", "name_loss", "style", "name_top1", "frechet")


def widths(config: Path, share: float) -> dict[str, int]:
    r"""
    A share of a base config's widths.

    Args:
        config (`Path`): Folder of the config.
        share (`float`): In (0, 1].

    Returns:
        `dict[str, int]`: Entries by their path, as `Trial.base` takes them; at least one head of each kind. Empty for
        all of the widths.
    """
    if share == 1:
        return {}
    values = json.loads((config / "config.json").read_text())
    entries = {path: values[path.split(".")[0]][path.split(".")[1]] for path in WIDTHS}
    return {path: max(1, round(share * value)) for path, value in entries.items()}


def plot(axes_of_study: dict[str, dict[object, list[dict[str, float]]]], file: Path) -> None:
    """Names answered and drawings named, along each of what is varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(axes_of_study), 4), layout="constrained")
    for axes, (label, runs) in zip(
        figure.subplots(1, len(axes_of_study), sharey=True), axes_of_study.items(), strict=True
    ):
        runs = {str(place).replace(", ", "\n"): outcomes for place, outcomes in runs.items()}
        for key in ("name", "name_top1"):
            plot_spread(axes, runs, key, LABELS[key])
        axes.set(xlabel=label, ylabel="%")
        axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study = open_study(args)
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    all_steps = settings.get("max_steps", recipe_steps())
    figures: dict[str, dict[object, list[dict[str, float]]]] = {}
    for seed in range(args.seeds):
        base = Trial("mmar", seed, settings)
        # A share of the steps is a training of its own, with its own cosine.
        steps = [max(1, round(share * all_steps)) for share in SHARES]
        trials = [("steps", n, base if n == all_steps else Trial("mmar", seed, {"max_steps": n})) for n in steps]
        trials += [("share of the rows", share, Trial("mmar", seed, settings, share=share)) for share in SHARES]
        for share in SHARES:
            trial = Trial("mmar", seed, settings, widths(args.config, share))
            millions = num_trained(study.config_of(trial), train_backbone=True) / 1e6
            trials.append(("share of the widths", f"{share}, {millions:.1f} M trained weights", trial))
        for axis, place, trial in trials:
            outcome = study.run(trial)
            figures.setdefault(axis, {}).setdefault(place, []).append(outcome)
            print(json.dumps({axis: place, "seed": seed, **outcome}), flush=True)
    name = f"scaling_{args.config.name}"
    picture = plot_path(args.out, name)
    plot(figures, picture)
    tables = [
        table(
            [axis, *(LABELS[key] for key in COLUMNS)],
            [[place, *(cell(outcomes, key) for key in COLUMNS)] for place, outcomes in runs.items()],
        )
        for axis, runs in figures.items()
    ]
    body = f"Mean and half of Student's 95 % interval over {args.seeds} seeds.\n\n"
    body += "\n\n".join([*tables, f"![]({picture.name})"])
    write_page(args.out, name, "Data and model scaling in small", told("mmar.ablations.scaling", args), body)


if __name__ == "__main__":
    run_command(main)

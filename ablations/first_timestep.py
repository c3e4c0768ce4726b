"""
Where sampling begins: at the schedule's last timestep, as MAR's sampler and MMAR's default do, or before it.

    python -m mmar.ablations.first_timestep --config ablations/configs/emoji \\
        --data checkpoints/emoji-lite/train.parquet --test checkpoints/emoji-lite/test.parquet --vae runs/vae \\
        --judge JUDGE.py --work runs/table3 --out docs/results

The trained models are those of `table3` in the same --work. At the last timestep the root of alpha-bar is 5e-5, and
what a model errs in the noise is divided by it (Eq. 18): here one sees how much of epsilon's lag in drawing that is.
The paper does not vary it.
"""

import argparse
import json
from pathlib import Path

from diffusers import DDPMScheduler

from ..command import run_command
from ..training.emoji_rows import read_rows
from .study import (
    NUM_INFERENCE_STEPS,
    Trial,
    add_arguments,
    cell,
    interval,
    open_pipeline,
    open_study,
    plot_path,
    table,
    told,
    write_figures,
    write_page,
)
from .systems import SYSTEMS


# Those that draw by diffusion.
DIFFUSION_SYSTEMS = ("mmar", "epsilon", "transfusion")
# diffusers' timestep_spacing: the default of MMAR, whose figures a trial has, and one that leaves the last ones out.
DEFAULT, OTHER = "linspace", "leading"
COLUMNS = {"name_top1": "drawings named", "style_drawn": "drawings in style", "frechet": "Frechet"}


def first_timestep(scheduler: DDPMScheduler, spacing: str) -> tuple[int, float]:
    """Where sampling begins, and the root of alpha-bar there."""
    scheduler = DDPMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    first = int(scheduler.timesteps[0])
    return first, float(scheduler.alphas_cumprod[first].sqrt())


def plot(figures: dict[tuple[str, int], list[dict[str, float]]], file: Path) -> None:
    """Drawings named, and Frechet distance, by system and first timestep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, factor, label) in zip(
        figure.subplots(1, 2), (("name_top1", 100, "drawings named, %"), ("frechet", 1, "Frechet")), strict=True
    ):
        means, halves = zip(*(interval([own[key] for own in runs]) for runs in figures.values()), strict=True)
        names = [f"{system}\nfrom {first}" for system, first in figures]
        axes.bar(names, [factor * mean for mean in means], yerr=[factor * half for half in halves], capsize=4)
        axes.set(title=label)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study, rows = open_study(args), read_rows(args.test)
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    figures: dict[tuple[str, int], list[dict[str, float]]] = {}
    roots = {}
    for seed in range(args.seeds):
        for system in DIFFUSION_SYSTEMS:
            trial = Trial(system, seed, settings)
            outcomes, pipe = {DEFAULT: study.run(trial)}, open_pipeline(study.final_of(trial))
            file = study.folder_of(trial) / f"drawn_{OTHER}.json"
            if not file.is_file():
                pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing=OTHER)
                write_figures(file, study.drawn(pipe, rows, file.with_suffix(""), seed))
            outcomes[OTHER] = json.loads(file.read_text())
            for spacing, outcome in outcomes.items():
                first, root = first_timestep(pipe.scheduler, spacing)
                roots[first] = root
                figures.setdefault((system, first), []).append(outcome)
                print(json.dumps({"system": system, "first_timestep": first, "seed": seed, **outcome}), flush=True)
    name = f"first_timestep_{args.config.name}"
    picture = plot_path(args.out, name)
    plot(figures, picture)
    lines = [
        [SYSTEMS[system], first, f"{roots[first]:.1e}", *(cell(runs, key) for key in COLUMNS)]
        for (system, first), runs in figures.items()
    ]
    body = f"""
The models of Table 3 in small, drawn in {NUM_INFERENCE_STEPS} steps of DDPM from the schedule's last timestep
(`timestep_spacing="{DEFAULT}"`, as in that table) and from an earlier one (`"{OTHER}"`). Mean and half of Student's
95 % interval over {args.seeds} seeds.

{table(["system", "first timestep", "root of alpha-bar", *COLUMNS.values()], lines)}

![]({picture.name})
"""
    write_page(args.out, name, "Where sampling begins", told("mmar.ablations.first_timestep", args), body)


if __name__ == "__main__":
    run_command(main)

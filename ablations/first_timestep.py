"""
Where sampling begins: at the schedule's last timestep, as MAR's sampler and MMAR's default do, or before it.

    python -m mmar.ablations.first_timestep --config ablations/configs/emoji \\
        --data checkpoints/emoji-lite/train.parquet --test checkpoints/emoji-lite/test.parquet --vae runs/vae \\
        --judge JUDGE.py --work runs/table3 --out docs/results

The trained models are those of `table3` in the same --work. At the last timestep sqrt(alpha-bar) is 5e-5, and
what a model errs in the noise is divided by it (Eq. 18): here one sees how much of epsilon's lag in drawing that is.
The paper does not vary it.
"""

import argparse
import json

from diffusers import DDPMScheduler

from ..command import run_command
from ..training.emoji_rows import read_rows
from .study import (
    LABELS,
    NUM_INFERENCE_STEPS,
    Trial,
    add_arguments,
    cell,
    open_pipeline,
    open_study,
    plot_bars,
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
MMAR_SPACING, EARLIER_SPACING = "linspace", "leading"
COLUMNS = ("name_top1", "style_drawn", "frechet")


def first_timestep(scheduler: DDPMScheduler, spacing: str) -> tuple[int, float]:
    """The timestep at which sampling begins, and sqrt(alpha-bar) there."""
    scheduler = DDPMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    first = int(scheduler.timesteps[0])
    return first, float(scheduler.alphas_cumprod[first].sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    study, rows = open_study(args), read_rows(args.test)
    settings = {} if args.num_steps is None else {"max_steps": args.num_steps}
    figures: dict[tuple[str, int], list[dict[str, float]]] = {}
    sqrt_alphas_cumprod = {}
    for seed in range(args.seeds):
        for system in DIFFUSION_SYSTEMS:
            trial = Trial(system, seed, settings)
            outcomes, pipe = {MMAR_SPACING: study.run(trial)}, open_pipeline(study.final_of(trial))
            file = study.folder_of(trial) / f"drawn_{EARLIER_SPACING}.json"
            if not file.is_file():
                pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing=EARLIER_SPACING)
                write_figures(file, study.drawn(pipe, rows, file.with_suffix(""), seed))
            outcomes[EARLIER_SPACING] = json.loads(file.read_text())
            for spacing, outcome in outcomes.items():
                first, sqrt_alpha_cumprod = first_timestep(pipe.scheduler, spacing)
                sqrt_alphas_cumprod[first] = sqrt_alpha_cumprod
                figures.setdefault((system, first), []).append(outcome)
                print(json.dumps({"system": system, "first_timestep": first, "seed": seed, **outcome}), flush=True)
    name = f"first_timestep_{args.config.name}"
    picture = plot_path(args.out, name)
    bars = {f"{system}, {first}": runs for (system, first), runs in figures.items()}
    plot_bars(bars, ("name_top1", "frechet"), picture)
    lines = [
        [SYSTEMS[system], first, f"{sqrt_alphas_cumprod[first]:.1e}", *(cell(runs, key) for key in COLUMNS)]
        for (system, first), runs in figures.items()
    ]
    body = f"""
The models of Table 3 in small, drawn in {NUM_INFERENCE_STEPS} steps of DDPM from the schedule's last timestep
(`timestep_spacing="{MMAR_SPACING}"`, as in that table) and from an earlier one (`"{EARLIER_SPACING}"`). Mean and half
of Student's 95 % interval over {args.seeds} seeds.

{table(["system", "first timestep", "sqrt(alpha-bar)", *(LABELS[key] for key in COLUMNS)], lines)}

![]({picture.name})
"""
    write_page(args.out, name, "Where sampling begins", told("mmar.ablations.first_timestep", args), body)


if __name__ == "__main__":
    run_command(main)

"""
What is drawn against what it costs: every opt-in setting of generation, judged, with several seeds.

    python -m mmar.benchmarks.quality checkpoints/mmar-tiny --data checkpoints/emoji-lite/test.parquet \
        --judge ../shared/tools/emoji_judge.py --out docs/results

The judge is a script that prints a JSON of `name_top1`, `name_top5`, `style` and `frechet` for a folder of pictures
with a captions.jsonl. Each drawing and judgement is kept under `--work`; started again, it goes on after the last.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from ..command import run_command
from ..conversion.models import open_pipeline
from ..evaluation.emoji_styles import draw
from ..files import check_folder
from ..modeling_mmar.generation_mmar import PRESETS
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.emoji_rows import read_rows
from .timing import commit, processor, versions


FIGURES = ("name_top1", "name_top5", "style", "frechet")
SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


def settings(num_latents: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What is varied, and each variant's arguments of the pipeline; `scheduler` by name."""
    every = {"num_ar_steps": num_latents}
    paper = {**every, "num_inference_steps": 100}
    rounds = [num_latents // 2**halvings for halvings in range(1, num_latents.bit_length())]
    return {
        "presets": {name: {"preset": name} for name in PRESETS},
        "AR steps, 100 steps of DDPM": {f"{number} AR steps": {**paper, "num_ar_steps": number} for number in rounds},
        "sampler, one latent a round": {
            **{f"DDPM, {number} steps": {**every, "num_inference_steps": number} for number in (50, 25, 10)},
            **{
                f"{name}, {number} steps": {**every, "num_inference_steps": number, "scheduler": name}
                for name in SCHEDULERS
                for number in (25, 10, 5)
            },
        },
        "annealed steps of DDPM, one latent a round": {
            f"{first} to {last} steps": {**every, "num_inference_steps": (first, last)}
            for first, last in ((100, 10), (50, 5), (25, 5))
        },
        "order, 25 steps of DDPM, a quarter of the rounds": {
            order: {"num_ar_steps": num_latents // 4, "num_inference_steps": 25, "order": order}
            for order in ("random", "checkerboard", "raster")
        },
        "guided share of 25 steps of DDPM, one latent a round": {
            f"{start} to {end}": {**every, "num_inference_steps": 25, "guidance_interval": (start, end)}
            for start, end in ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))
        },
    }


def run(
    pipe: MMARPipeline, rows: list[dict[str, Any]], judge: Path, folder: Path, seed: int, arguments: dict[str, Any]
) -> dict[str, float]:
    """The judge's figures for one drawing of all rows, and its CPU seconds per picture; read, if made before."""
    file = folder / "judged.json"
    if file.is_file():
        return json.loads(file.read_text())
    scheduler, is_on_cpu = pipe.scheduler, pipe.device.type == "cpu"
    # Pictures are on the host when they are drawn, so wall time is a device's too.
    clock = time.process_time if is_on_cpu else time.perf_counter
    if "scheduler" in arguments:
        pipe.scheduler = SCHEDULERS[arguments["scheduler"]].from_config(scheduler.config)
    try:
        start = clock()
        own = {name: value for name, value in arguments.items() if name != "scheduler"}
        draw(pipe, rows, folder, seed, **own)
        seconds = (clock() - start) / len(rows)
    finally:
        pipe.scheduler = scheduler
    done = subprocess.run([sys.executable, str(judge), str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        figures = json.loads(done.stdout)
        judged = {"seconds": seconds, **{name: float(figures[name]) for name in FIGURES}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a JSON of {', '.join(FIGURES)} from {judge.name}; it ended with {done.returncode} and wrote "
            f"{done.stdout[:200]!r}. Its own messages are above."
        ) from error
    # Whole or not there.
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(judged) + "\n")
    partial.replace(file)
    return judged


def folder_of(work: Path, judge: Path, scheduler: Any, seed: int, arguments: dict[str, Any]) -> Path:
    """Where the drawings of a setting lie, by all that they and their figures hang on."""
    parts = {"arguments": arguments, "scheduler": dict(scheduler.config), "seed": seed}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode() + judge.read_bytes())
    return work / digest.hexdigest()[:16]


def claim(work: Path, pipe: MMARPipeline, rows: list[dict[str, Any]]) -> None:
    """Raises a `ValueError` if a folder holds drawings of another model or of other rows; marks it else."""
    digest = hashlib.sha256()
    for parameter in pipe.model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([[row[name] for name in ("captions", "label", "style")] for row in rows]).encode())
    file = work / "drawings_of.json"
    if file.is_file() and json.loads(file.read_text()) != digest.hexdigest():
        raise ValueError(
            f"expected drawings of this model and these rows in {str(work)!r}; got those of others. Name another "
            "folder as --work, or delete it."
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(digest.hexdigest()))


def over_seeds(judged: Iterable[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean, and standard deviation over seeds, of each figure."""
    judged = list(judged)
    columns = {name: [own[name] for own in judged] for name in judged[0]}
    return {
        name: (statistics.mean(column), statistics.stdev(column) if len(column) > 1 else 0.0)
        for name, column in columns.items()
    }


def row(name: str, figures: dict[str, tuple[float, float]]) -> str:
    shares = [f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in (figures[key] for key in FIGURES[:3])]
    mean, spread = figures["frechet"]
    return f"| {name} | {1e3 * figures['seconds'][0]:.0f} | {' | '.join(shares)} | {mean:.1f} ± {spread:.1f} |"


HEAD = (
    "| setting | CPU ms a picture | name first, % | among five, % | style, % | Frechet |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def plot(groups: dict[str, dict[str, dict[str, tuple[float, float]]]], file: Path) -> None:
    """Names that the judge reads against time, one mark a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for group, variants in groups.items():
        seconds = [1e3 * figures["seconds"][0] for figures in variants.values()]
        shares, spreads = zip(*(figures["name_top1"] for figures in variants.values()), strict=True)
        axes.errorbar(seconds, [100 * s for s in shares], [100 * s for s in spreads], fmt="o", capsize=2, label=group)
        if group == "presets":
            for name, x, y in zip(variants, seconds, shares, strict=True):
                axes.annotate(name, (x, 100 * y), textcoords="offset points", xytext=(5, 5))
    axes.set(xscale="log", xlabel="CPU ms a picture", ylabel="name is the judge's first choice, %")
    axes.legend(fontsize="x-small")
    figure.savefig(file)


def report(groups: dict[str, dict[str, dict[str, tuple[float, float]]]], command: str, picture: str) -> str:
    """The results as a page of docs/results."""
    tables = "\n\n".join(
        f"## {group[0].upper()}{group[1:]}\n\n{HEAD}\n" + "\n".join(row(name, own) for name, own in variants.items())
        for group, variants in groups.items()
    )
    return f"""# Quality and time of generation

{date.today().isoformat()}, commit {commit()}, {processor()}; {versions()}. Written by

    {command}

Means and standard deviations over seeds. The judge names emoji; time is CPU time in batches, without the judge.

![]({picture})

{tables}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an MMAR")
    parser.add_argument("--data", required=True, type=Path, help="parquet of held-out rows")
    parser.add_argument("--judge", required=True, type=Path, help="script that scores a folder of pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the page and the plot to")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder for the drawings")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--num_rows", type=int, help="so many rows, spread over the file; all by default")
    args = parser.parse_args()
    if not args.judge.is_file():
        parser.error(f"--judge must be a script; {args.judge} is not there")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {args.seeds}")
    rows = read_rows(args.data)
    if args.num_rows is not None:
        if not 1 <= args.num_rows <= len(rows):
            parser.error(f"--num_rows must be between 1 and {len(rows)}, the rows of {args.data.name}")
        rows = [rows[i * len(rows) // args.num_rows] for i in range(args.num_rows)]
    check_folder(args.out)
    pipe = open_pipeline(args.model)
    claim(args.work, pipe, rows)
    # Merges weights, which is no setting's time.
    pipe(rows[0]["captions"][0], num_inference_steps=2)
    groups: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    chosen = settings(pipe.model.config.num_latents)
    for group, variants in chosen.items():
        print(f"\n{group}\n\n{HEAD}")
        groups[group] = {}
        for name, arguments in variants.items():
            judged = []
            for number in tqdm(range(args.seeds), desc=name, leave=False):
                # A picture's seed is the sum of this one and its row's number.
                seed = number * len(rows)
                folder = folder_of(args.work, args.judge, pipe.scheduler, seed, arguments)
                judged.append(run(pipe, rows, args.judge, folder, seed, arguments))
            groups[group][name] = over_seeds(judged)
            print(row(name, groups[group][name]), flush=True)
    today = date.today().isoformat()
    plot(groups, args.out / f"{today}_quality.svg")
    command = f"python -m mmar.benchmarks.quality {args.model} --data {args.data} --judge {args.judge.name} "
    command += f"--out {args.out} --seeds {args.seeds}"
    command += "" if args.num_rows is None else f" --num_rows {args.num_rows}"
    (args.out / f"{today}_quality.md").write_text(report(groups, command, f"{today}_quality.svg"), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)

"""
What is drawn against what it costs: every opt-in setting of generation, judged, with several seeds.

    python -m mmar.benchmarks.quality checkpoints/mmar-tiny --data checkpoints/emoji-lite/test.parquet \
        --judge ../shared/tools/emoji_judge.py --out docs/results

The judge is a script that prints a JSON of `name_top1`, `name_top5`, `style` and `frechet` for a folder of pictures
with a captions.jsonl. Each drawing and judgement is kept under `--work`; started again, it goes on after the last.
"""

import argparse
import statistics
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..command import run_command
from ..conversion.models import open_pipeline
from ..evaluation.judging import FIGURES, SCHEDULERS, claim, folder_of, run
from ..evaluation.provenance import commit, processor, versions
from ..files import check_folder
from ..modeling_mmar.generation_mmar import PRESETS
from ..training.emoji_rows import read_rows


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

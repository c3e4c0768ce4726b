"""Drawings of a model at one setting, which a judge scores; each drawing and judgement is made once and kept."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ..files import write_whole
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.fingerprint import fingerprint
from .emoji_styles import draw


FIGURES = ("name_top1", "name_top5", "style", "frechet")
SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


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
    write_whole(file, f"{json.dumps(judged)}\n".encode())
    return judged


def folder_of(work: Path, judge: Path, scheduler: Any, seed: int, arguments: dict[str, Any]) -> Path:
    """The folder of the images of a setting, named by all that they and their figures depend on."""
    parts = {"arguments": arguments, "scheduler": dict(scheduler.config), "seed": seed}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode() + judge.read_bytes())
    return work / digest.hexdigest()[:16]


def claim(work: Path, pipe: MMARPipeline, rows: list[dict[str, Any]]) -> None:
    """Raises a `ValueError` if a folder holds drawings of another model or of other rows; marks it else."""
    of_rows = [[row[name] for name in ("captions", "label", "style")] for row in rows]
    digest = fingerprint(of_rows, pipe.model.state_dict())
    file = work / "drawings_of.json"
    if file.is_file() and json.loads(file.read_text()) != digest:
        raise ValueError(
            f"expected drawings of this model and these rows in {str(work)!r}; got those of others. Name another "
            "folder as --work, or delete it."
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(digest))

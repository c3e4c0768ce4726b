"""Times of computations that take turns in one run: CPU time, medians and spread; and where they were measured."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process for one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def take_turns(runs: Sequence[Callable[[], object]], num_runs: int) -> list[list[float]]:
    """CPU seconds of each of `runs`, `num_runs` times in turn; each is run once before."""
    for run in runs:
        run()
    return [list(times) for times in zip(*([cpu_seconds(run) for run in runs] for _ in range(num_runs)), strict=True)]


def medians(runs: Sequence[Callable[[], object]], num_runs: int) -> list[float]:
    """Medians of `take_turns`."""
    return [statistics.median(times) for times in take_turns(runs, num_runs)]


@dataclass
class Ratio:
    """How many times as fast a computation is as another: the median over turns, and the middle half of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, plain: Sequence[float], fast: Sequence[float]) -> "Ratio":
        ratios = [slow / quick for slow, quick in zip(plain, fast, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def commit() -> str:
    """The checkout's commit, and whether there are changes on top, other than of the pages of results."""
    git = ["git", "-C", str(Path(__file__).parent)]
    code = [":(top)", ":(top,exclude)docs/results"]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def peak_gibibytes() -> float | None:
    """The largest memory that this process had, where the system tells."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20  # of KiB


def versions() -> str:
    """Of the libraries that the times hang on."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"

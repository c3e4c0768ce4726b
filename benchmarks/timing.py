"""Times of computations that take turns in one run: CPU time, medians and spread."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


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


def peak_gibibytes() -> float | None:
    """The largest memory that this process had, where the system tells."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20  # of KiB

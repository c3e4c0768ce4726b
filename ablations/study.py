"""
What the experiments share: trials of one data set, each a system trained from scratch and measured, and their table.

A trial is kept in its folder, with what it is made of beside its figures: a study that was stopped goes on within the
trial that it was at, and one that was changed says so.
"""

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..benchmarks.timing import commit, processor, versions
from ..evaluation.emoji_styles import ask, draw
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.emoji_rows import read_rows
from .systems import system_config


RECIPE = Path(__file__).parent / "recipes" / "small.yaml"
# How a system's training departs from the recipe: the Transfusion-like one generates whole pictures.
SETTINGS = {"transfusion": {"mask_ratio_min": 0.999}}
NUM_INFERENCE_STEPS = 50
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Trial:
    r"""
    One training from scratch.

    Args:
        system (`str`): A key of `SYSTEMS`.
        seed (`int`): Of its weights, batches and drawings.
        settings (`dict`, *optional*): Of the recipe, where it differs.
        base (`dict`, *optional*): Entries of the base config, by their path with dots, where it differs.
        share (`float`, *optional*, defaults to 1.0): Part of the training rows, in (0, 1].
        start (`Trial`, *optional*): A trial to go on from, in place of untrained weights.
    """

    system: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    start: "Trial | None" = None

    @property
    def name(self) -> str:
        """Names its folder."""
        parts = [self.system, f"seed{self.seed}"]
        parts += [f"{key.split('.')[-1]}{value}" for key, value in {**self.settings, **self.base}.items()]
        if self.share < 1:
            parts.append(f"share{self.share:g}")
        if self.start is not None:
            parts.append(f"after_{self.start.name}")
        return "_".join(parts)


@dataclass
class Study:
    r"""
    A data set and where its trials are kept.

    Args:
        config (`Path`): Folder of the base config.
        data, test (`Path`): Parquets of training and of held-out rows.
        vae (`Path`): Folder of a trained `AutoencoderKL`.
        vq (`Path`, *optional*): Folder of a trained `VQModel`, for "vq".
        judge (`str`): What Python is to run on a folder of drawings, which is added to it: a script, or
            `-m module ...`. It prints a JSON.
        work (`Path`): Folder of the trials.
        num_copies (`int`, *optional*, defaults to 6): Views of each picture to train on.
    """

    config: Path
    data: Path
    test: Path
    vae: Path
    vq: Path | None
    judge: str
    work: Path
    num_copies: int = 6

    def __post_init__(self):
        for name in ("data", "test"):
            if not getattr(self, name).is_file():
                raise ValueError(f"expected a parquet of rows for --{name}; {getattr(self, name)} is not there.")
        for name in ("config", "vae", "vq"):
            folder = getattr(self, name)
            if folder is not None and not (folder / "config.json").is_file():
                raise ValueError(f"expected a folder with a config.json for --{name}; {folder} is none.")

    def run(self, trial: Trial) -> dict[str, float]:
        r"""
        A trial's figures: read, if it was done; else it is trained and measured, from where it was stopped.

        Returns:
            `dict`: Shares of the held-out rows that are answered exactly, `caption`, `name` and `style`, the judge's
            `name_top1`, `style_drawn` and `frechet`, and the last `text_loss` and `image_loss`.

        Raises:
            ValueError: If the folder holds another trial, or a part of it failed.
        """
        folder = self.work / "trials" / trial.name
        self._claim(folder, trial)
        file = folder / "figures.json"
        if not file.is_file():
            figures = {**self._train(folder, trial), **self.measure(folder / "run" / "final", folder, trial.seed)}
            _write(file, figures)
        return json.loads(file.read_text())

    def final_of(self, trial: Trial) -> Path:
        """Folder of a trained model."""
        self.run(trial)
        return self.work / "trials" / trial.name / "run" / "final"

    def measure(self, model: Path, out: Path, seed: int, **options: Any) -> dict[str, float]:
        r"""
        Answers and drawings of a model for all held-out rows.

        Args:
            model (`Path`): Folder.
            out (`Path`): Folder for the drawings.
            seed (`int`): Of the drawings.
            **options: Of the pipeline.

        Returns:
            `dict` of shares and the Frechet distance.
        """
        rows, pipe = read_rows(self.test), open_pipeline(model)
        figures = self.understand(pipe, rows)
        draw(pipe, rows, out / "pictures", 1000 * seed, **{"num_inference_steps": NUM_INFERENCE_STEPS, **options})
        judged = self.scored(out / "pictures")
        return {
            **figures,
            "name_top1": judged["name_top1"],
            "style_drawn": judged["style"],
            "frechet": judged["frechet"],
            "frechet_real": judged["frechet_real"],
        }

    def understand(self, pipe: MMARPipeline, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Shares of the rows whose answer is exactly right, for each of their questions."""
        pictures = pipe.processor.image_processor.fetch_images([row["image"] for row in rows])
        shares = {}
        for number, name in enumerate(("caption", "name", "style")):
            question = rows[0]["questions"][number]
            answers = ask(pipe, pictures, question)
            shares[name] = statistics.mean(
                answer.strip() == row["answers"][number] for answer, row in zip(answers, rows, strict=True)
            )
        return shares

    def scored(self, pictures: Path) -> dict[str, float]:
        """What the judge prints of a folder of drawings."""
        command = [sys.executable, *shlex.split(self.judge), str(pictures)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        try:
            return json.loads(done.stdout)
        except ValueError as error:
            raise ValueError(
                f"expected a JSON from the judge {self.judge!r}; it ended with {done.returncode} and wrote "
                f"{done.stdout[:200]!r}. Its own messages are above."
            ) from error

    def _claim(self, folder: Path, trial: Trial) -> None:
        """Marks a folder as a trial's; raises a `ValueError` if it is another's."""
        own = json.loads(json.dumps({**asdict(trial), "recipe": RECIPE.read_text(), "data": self.data.name}))
        file = folder / "trial.json"
        if file.is_file() and json.loads(file.read_text()) != own:
            raise ValueError(
                f"expected the trial {trial.name!r} in {str(folder)!r}; it was made with other settings. Remove it, "
                "or name another --work."
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, own)

    def _train(self, folder: Path, trial: Trial) -> dict[str, float]:
        data, init = self._rows(trial.share), folder / "init"
        if trial.start is not None:
            init = self.final_of(trial.start)
        elif not (init / "model.safetensors").is_file():
            self._make_init(trial, init)
        settings = {"seed": trial.seed, **SETTINGS.get(trial.system, {}), **trial.settings}
        words = [str(RECIPE), f"model={init}", f"data={data}", f"latents={self._latents(trial, init, data)}"]
        words += [f"output_dir={folder / 'run'}", *(f"{key}={value}" for key, value in settings.items())]
        _call("mmar.training.train", *words)
        history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
        last = [entry for entry in history if "text_loss" in entry][-10:]
        return {name: statistics.mean(entry[name] for entry in last) for name in ("text_loss", "image_loss")}

    def _make_init(self, trial: Trial, init: Path) -> None:
        values = json.loads((self.config / "config.json").read_text())
        for path, value in trial.base.items():
            *parents, key = path.split(".")
            entry = values
            for parent in parents:
                entry = entry[parent]
            entry[key] = value
        values["text_config"].pop("layer_types", None)
        is_vq = trial.system == "vq"
        if is_vq and self.vq is None:
            raise ValueError("expected --vq, a folder of a trained VQModel, for the system 'vq'.")
        tokenizer = self.vq if is_vq else self.vae
        vq_config = None
        if is_vq:
            read = json.loads((self.vq / "config.json").read_text())
            vq_config = {key: value for key, value in read.items() if not key.startswith("_")}
        config = system_config(trial.system, MMARConfig.from_dict(values), vq_config)
        of_config = init.with_name("config")
        config.save_pretrained(of_config)
        _call(
            "mmar.training.init_tiny",
            *("--config", of_config, "--data", self.data, "--vae", tokenizer, "--out", init, "--seed", trial.seed),
        )

    def _rows(self, share: float) -> Path:
        """All training rows, or the first of them in an order that is drawn once."""
        if share == 1:
            return self.data
        file = self.work / f"rows_{share:g}.parquet"
        if not file.is_file():
            table = pq.read_table(self.data)
            order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
            kept = sorted(order[: max(1, round(share * len(table)))].tolist())
            partial = file.with_suffix(".partial")
            pq.write_table(table.take(pa.array(kept)), partial, compression="zstd")
            partial.replace(file)
        return file

    def _latents(self, trial: Trial, init: Path, data: Path) -> Path:
        """Cached latents of these rows by the trial's tokenizer, made if they are not there."""
        kind = "vq" if trial.system == "vq" else "kl"
        folder = self.work / f"latents_{kind}_{data.stem}"
        _call("mmar.training.latents", data, "--model", init, "--out", folder, "--num_copies", self.num_copies)
        return folder


def open_pipeline(model: Path) -> MMARPipeline:
    """In bfloat16, the precision of the training (suppl. Sec. 6.1, "Mixed-Precision Inference")."""
    return MMARPipeline.from_pretrained(model, dtype=torch.bfloat16)


def _write(file: Path, values: dict[str, Any]) -> None:
    """Whole or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(file)


def _call(module: str, *words: object) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)])
    if done.returncode:
        raise ValueError(
            f"expected {module} to do its work; it ended with {done.returncode}, and its messages are above. Started "
            "again, the study goes on there."
        )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval; NaN for one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], is_share: bool = True) -> str:
    """A figure over seeds, as a table shows it."""
    mean, half = interval(values)
    factor, unit = (100, " %") if is_share else (1, "")
    spread = "" if math.isnan(half) else f" ± {factor * half:.1f}"
    return f"{factor * mean:.1f}{spread}{unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def add_arguments(parser: Any) -> None:
    """What every study is told."""
    parser.add_argument("--config", required=True, type=Path, help="folder of the base config, of ablations/configs")
    parser.add_argument("--data", required=True, type=Path, help="parquet of training rows")
    parser.add_argument("--test", required=True, type=Path, help="parquet of held-out rows")
    parser.add_argument("--vae", required=True, type=Path, help="folder of a trained AutoencoderKL")
    parser.add_argument("--vq", type=Path, help="folder of a trained VQModel")
    parser.add_argument("--judge", required=True, help="script, or `-m module ...`, that scores a folder of drawings")
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps the trials")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the page and the plot to")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--num_steps", type=int, help="of training; the recipe's by default")


def open_study(args: Any) -> Study:
    """The study that the words tell."""
    if not 1 <= args.seeds <= len(STUDENT) + 1:
        raise ValueError(f"--seeds must be between 1 and {len(STUDENT) + 1}; got {args.seeds}.")
    return Study(args.config, args.data, args.test, args.vae, args.vq, args.judge, args.work)


def write_page(out: Path, name: str, title: str, command: str, body: str) -> None:
    """A page of docs/results, dated, with where it was made."""
    out.mkdir(parents=True, exist_ok=True)
    today = date.today().isoformat()
    head = f"# {title}\n\n{today}, commit {commit()}, {processor()}; {versions()}. Written by\n\n    {command}\n"
    (out / f"{today}_{name}.md").write_text(f"{head}\n{body.strip()}\n", encoding="utf-8")


def plot_path(out: Path, name: str) -> Path:
    """Where a page's plot lies."""
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{date.today().isoformat()}_{name}.png"


def told(module: str, args: Any) -> str:
    """The command, as a page shows it; paths as they were given."""
    words = [f"python -m {module}"]
    for name, value in vars(args).items():
        if value is not None:
            given = value if isinstance(value, list) else [value]
            words.append(f"--{name} {shlex.join(map(str, given))}")
    return " ".join(words)

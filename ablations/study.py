"""
What the experiments share: trials of one data set, each a system trained from scratch and measured, and their table.

A trial is kept in its folder, with hashes of all that it is made of beside its figures: a study that was stopped goes
on within the trial that it was at, and one that was changed says so.
"""

import functools
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from transformers.utils import is_matplotlib_available

from ..conversion.folders import new_folder
from ..evaluation.answers import MMARAnswerer
from ..evaluation.emoji_styles import BATCH_SIZE, ask, chat_about, draw
from ..evaluation.provenance import commit, processor, versions
from ..files import check_folder, write_whole
from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.saving_mmar import sha256_of
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.emoji_rows import read_rows
from .systems import system_config


RECIPE = Path(__file__).parent / "recipes" / "small.yaml"
# How a system's training departs from the recipe: the Transfusion-like one generates whole pictures.
SETTINGS = {"transfusion": {"mask_ratio_min": 0.999}}
NUM_INFERENCE_STEPS = 50
# diffusers' file of a model's weights.
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Steps between losses that are logged, and how many of these are averaged at the end.
NUM_LOGGED, NUM_AVERAGED = 100, 10
# What a row's questions ask for.
QUESTION_KINDS = ("caption", "name", "style")
# What tables and plots call the figures.
LABELS = {
    "name": "names answered",
    "name_loss": "nats per name",
    "style": "styles answered",
    "name_top1": "drawings named",
    "style_drawn": "drawings in style",
    "frechet": "Frechet",
}
# Figures that are no share, and their decimals.
DECIMALS = {"name_loss": 2, "frechet": 1}
# Our names of the judge's figures.
JUDGED = {"name_top1": "name_top1", "style_drawn": "style", "frechet": "frechet", "frechet_real": "frechet_real"}
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
            `dict`: What `understand` tells of the held-out rows, the judge's `name_top1`, `style_drawn` and `frechet`,
            and the last `text_loss` and `image_loss`.

        Raises:
            ValueError: If the folder holds another trial, or a part of it failed.
        """
        folder = self.folder_of(trial)
        self._claim(folder, trial)
        file = folder / "figures.json"
        if not file.is_file():
            figures = {**self._train(folder, trial), **self.measure(folder / "run" / "final", folder, trial.seed)}
            write_figures(file, figures)
        return json.loads(file.read_text())

    def folder_of(self, trial: Trial) -> Path:
        """Where a trial is kept."""
        return self.work / "trials" / trial.name

    def final_of(self, trial: Trial) -> Path:
        """Folder of a trained model."""
        self.run(trial)
        return self.folder_of(trial) / "run" / "final"

    def measure(self, model: Path, out: Path, seed: int) -> dict[str, float]:
        r"""
        Answers and drawings of a model for all held-out rows.

        Args:
            model (`Path`): Folder.
            out (`Path`): Folder for the drawings.
            seed (`int`): Of the drawings.

        Returns:
            `dict` of what `understand` and the judge tell.
        """
        rows, pipe = read_rows(self.test), open_pipeline(model)
        return {**self.understand(pipe, rows), **self.drawn(pipe, rows, out / "pictures", seed)}

    def drawn(self, pipe: MMARPipeline, rows: list[dict[str, Any]], out: Path, seed: int) -> dict[str, float]:
        """Draws the captions of rows into a folder; the judge's figures, by our names."""
        draw(pipe, rows, out, 1000 * seed, num_inference_steps=NUM_INFERENCE_STEPS)
        judged = self.scored(out)
        return {name: float(judged[key]) for name, key in JUDGED.items()}

    def understand(self, pipe: MMARPipeline, rows: list[dict[str, Any]]) -> dict[str, float]:
        r"""
        How a model answers the three questions of rows.

        Args:
            pipe (`MMARPipeline`): Model and processor.
            rows (`list[dict]`): Rows with an image, questions and answers.

        Returns:
            `dict`: Shares of the rows that are answered exactly, `caption`, `name` and `style`; and `name_loss`, the
            mean negative log-probability of a row's name as the beginning of the answer, in nats, which tells models
            apart whose answers are all wrong.

        Raises:
            ValueError: If the rows have not all the same three questions.
        """
        questions = rows[0]["questions"]
        for place, row in enumerate(rows):
            if row["questions"] != questions or len(questions) != len(QUESTION_KINDS):
                raise ValueError(
                    f"expected {len(QUESTION_KINDS)} questions, the same of every held-out row, for "
                    f"{', '.join(QUESTION_KINDS)}; row {place} has {row['questions']}, and the first {questions}. "
                    "Write the rows anew."
                )
        pictures = pipe.processor.image_processor.fetch_images([row["image"] for row in rows], places=False)
        shares = {}
        for number, name in enumerate(QUESTION_KINDS):
            answers = ask(pipe, pictures, questions[number])
            shares[name] = statistics.mean(
                answer.strip() == row["answers"][number] for answer, row in zip(answers, rows, strict=True)
            )
        number = QUESTION_KINDS.index("name")
        chats = [chat_about(picture, questions[number]) for picture in pictures]
        answerer = MMARAnswerer(pipe.model, pipe.processor, BATCH_SIZE)
        scores = answerer.log_likelihoods(chats, [row["answers"][number] for row in rows])
        return {**shares, "name_loss": -statistics.mean(score for score, _ in scores)}

    def scored(self, pictures: Path) -> dict[str, float]:
        """What the judge prints of a folder of drawings."""
        command = [sys.executable, *shlex.split(self.judge), str(pictures)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        try:
            judged = json.loads(done.stdout)
            return {key: judged[key] for key in JUDGED.values()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected a JSON with {', '.join(JUDGED.values())} from the judge {shorten(self.judge)}; it ended "
                f"with {done.returncode} and wrote {shorten(done.stdout[:200])}. Its own messages are above."
            ) from error

    def _claim(self, folder: Path, trial: Trial) -> None:
        """Marks a folder as a trial's; raises a `ValueError` if it is another's."""
        own = json.loads(json.dumps({"trial": asdict(trial), **self._made_of}))
        if trial.system == "vq" and self.vq is not None:
            own["VQ tokenizer"] = sha256_of(self.vq / WEIGHTS)
        file = folder / "trial.json"
        begun = json.loads(file.read_text()) if file.is_file() else own
        if changed := [name for name in own if begun.get(name) != own[name]]:
            raise ValueError(
                f"expected the trial {shorten(trial.name)} in {shorten(str(folder))}; it was begun with another "
                f"{changed[0]}. Remove it, or name another --work."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_figures(file, {**begun, **own})

    @functools.cached_property
    def _made_of(self) -> dict[str, Any]:
        """What the figures of all trials hang on, by what it is called in messages."""
        files = {"training data": self.data, "held-out data": self.test, "config": self.config / "config.json"}
        files["VAE"] = self.vae / WEIGHTS
        for word in shlex.split(self.judge):
            if Path(word).is_file():
                files[f"judge's {Path(word).name}"] = Path(word)
        return {
            **{name: sha256_of(file) for name, file in files.items()},
            "judge": [Path(word).name for word in shlex.split(self.judge)],
            "recipe": RECIPE.read_text(),
            "departures from the recipe": SETTINGS,
            "number of copies": self.num_copies,
            "number of diffusion steps": NUM_INFERENCE_STEPS,
        }

    def _train(self, folder: Path, trial: Trial) -> dict[str, float]:
        data, init = self._rows(trial.share), folder / "init"
        if trial.start is not None:
            init = self.final_of(trial.start)
        elif not init.is_dir():
            self._make_init(trial, init)
        settings = {"seed": trial.seed, **SETTINGS.get(trial.system, {}), **trial.settings}
        # A short training says something too.
        settings["logging_steps"] = min(NUM_LOGGED, settings.get("max_steps", NUM_LOGGED))
        words = [str(RECIPE), f"model={init}", f"data={data}", f"latents={self._latents(trial, init, data)}"]
        words += [f"output_dir={folder / 'run'}", *(f"{key}={value}" for key, value in settings.items())]
        _call("mmar train", *words)
        states = sorted((folder / "run").glob("checkpoint-*/trainer_state.json"), key=_step_of)
        state = folder / "run" / "trainer_state.json"
        history = json.loads((state if state.is_file() else states[-1]).read_text())["log_history"]
        losses = {}
        for name in ("text_loss", "image_loss"):
            last = [entry[name] for entry in history if name in entry][-NUM_AVERAGED:]
            losses[name] = statistics.mean(last) if last else math.nan
        return losses

    def config_of(self, trial: Trial) -> MMARConfig:
        """The config of a trial's model; raises a `ValueError` if it needs a VQ tokenizer that is not there."""
        values = json.loads((self.config / "config.json").read_text())
        for path, value in trial.base.items():
            *parents, key = path.split(".")
            entry = values
            for parent in parents:
                entry = entry[parent]
            entry[key] = value
        values["text_config"].pop("layer_types", None)
        vq_config = None
        if trial.system == "vq":
            if self.vq is None:
                raise ValueError("expected --vq, a folder of a trained VQModel, for the system 'vq'.")
            read = json.loads((self.vq / "config.json").read_text())
            vq_config = {key: value for key, value in read.items() if not key.startswith("_")}
        return system_config(trial.system, MMARConfig.from_dict(values), vq_config)

    def _make_init(self, trial: Trial, init: Path) -> None:
        config, of_config = self.config_of(trial), init.with_name("config")
        config.save_pretrained(of_config)
        tokenizer = self.vq if trial.system == "vq" else self.vae
        with new_folder(init) as whole:
            # All systems begin untrained.
            options = ["--vae", tokenizer, "--no-take_latent_encoder", "--out", whole, "--seed", trial.seed]
            _call("mmar.training.init_tiny", "--config", of_config, "--data", self.data, *options)

    def _rows(self, share: float) -> Path:
        """All training rows, or the first of them in an order that is drawn once."""
        if share == 1:
            return self.data
        file = self.work / f"rows_{share:g}_{self._made_of['training data'][:8]}.parquet"
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
        _call("mmar cache-latents", data, "--model", init, "--out", folder, "--num_copies", self.num_copies)
        return folder


def recipe_steps() -> int:
    """Steps of the recipe."""
    return yaml.safe_load(RECIPE.read_text())["max_steps"]


def open_pipeline(model: Path) -> MMARPipeline:
    """In bfloat16, the precision of the training (suppl. Sec. 6.1), on the accelerator if there is one."""
    pipe = MMARPipeline.from_pretrained(model, dtype=torch.bfloat16)
    return pipe.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else pipe


def check_plots(out: Path) -> None:
    """Raises a `ValueError` if no plot can be made, or none be written to `out`: hours before it would be."""
    check_folder(out)
    if not is_matplotlib_available():
        raise ValueError("expected matplotlib, for the plot; it is not there. `pip install mmar[plots]` brings it.")


def _step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def write_figures(file: Path, values: dict[str, Any]) -> None:
    """Whole or not there."""
    write_whole(file, f"{json.dumps(values, indent=1)}\n".encode())


def _call(command: str, *words: object) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split(), *map(str, words)])
    if done.returncode:
        raise ValueError(
            f"expected {command} to do its work; it ended with {done.returncode}, and its messages are above. Started "
            "again, the study goes on there."
        )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval; NaN for one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def cell(runs: Sequence[dict[str, float]], figure: str) -> str:
    """A figure over the runs of several seeds, as a table shows it: shares in percent."""
    mean, half = interval([own[figure] for own in runs])
    factor, unit, decimals = (1, "", DECIMALS[figure]) if figure in DECIMALS else (100, " %", 1)
    spread = "" if math.isnan(half) else f" ± {factor * half:.{decimals}f}"
    return f"{factor * mean:.{decimals}f}{spread}{unit}"


def spread(figures: Mapping[Any, Sequence[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """Means of a figure over the runs at each place, and half of their intervals; shares in percent."""
    factor = 1 if key in DECIMALS else 100
    means, halves = zip(*(interval([factor * own[key] for own in runs]) for runs in figures.values()), strict=True)
    return list(means), list(halves)


def plot_spread(axes: Any, figures: Mapping[Any, Sequence[dict[str, float]]], key: str, label: str | None) -> None:
    """A line over the places of `figures`, with the interval at each."""
    axes.errorbar(list(figures), *spread(figures, key), marker="o", capsize=4, label=label)


def plot_bars(figures: dict[str, Sequence[dict[str, float]]], keys: Sequence[str], file: Path) -> None:
    """One panel per figure, with a bar for each name's runs and Student's interval over their seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.5, 0.8 * len(figures)) * len(keys) + 1, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        means, halves = spread(figures, key)
        axes.bar(list(figures), means, yerr=halves, capsize=4)
        axes.set(title=LABELS[key] + ("" if key in DECIMALS else ", %"))
        axes.tick_params(axis="x", rotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    figure.savefig(file)


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
    parser.add_argument("--num_copies", type=int, default=6, help="views of each picture beside itself (views.py)")


def open_study(args: Any) -> Study:
    """The study that the words tell; a `ValueError` tells what would stop it hours later."""
    if not 1 <= args.seeds <= len(STUDENT) + 1:
        raise ValueError(f"--seeds must be between 1 and {len(STUDENT) + 1}; got {args.seeds}.")
    if args.num_copies < 0 or (args.num_steps is not None and args.num_steps < 1):
        raise ValueError(
            f"--num_steps must be at least 1, and --num_copies at least 0; got {args.num_steps} and {args.num_copies}."
        )
    check_plots(args.out)
    check_folder(args.work, "--work")
    judge = shlex.split(args.judge)
    if not judge or not (judge[0].startswith("-") or Path(judge[0]).is_file()):
        raise ValueError(f"expected a script, or `-m module ...`, for --judge; {shorten(args.judge)} is not there.")
    return Study(args.config, args.data, args.test, args.vae, args.vq, args.judge, args.work, args.num_copies)


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


def told(module: str, args: Any, positional: str | None = None) -> str:
    """The command, as a page shows it; paths as they were given."""
    words = [f"python -m {module}"]
    if positional is not None:
        words.append(shlex.quote(str(getattr(args, positional))))
    for name, value in vars(args).items():
        if value is not None and name != positional:
            given = value if isinstance(value, list) else [value]
            words.append(f"--{name} {shlex.join(map(str, given))}")
    return " ".join(words)

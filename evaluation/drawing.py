"""
Draws pictures for many prompts, in one process or in many, and goes on after a kill.

The commands `fid`, `geneval` and `dpg` draw through it. Their folder holds drawing.json, which says what draws there,
and the pictures as PNG files, each whole or not there.

A picture's noise hangs on the run's seed and its own number only. Batches are blocks of consecutive numbers, whichever
process draws them and whatever is drawn already: the files of a run that was killed, or of any number of processes,
are byte by byte those of one unbroken process. Another batch size only rounds a picture otherwise.
"""

import datetime
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from tqdm.auto import tqdm

from .. import __version__
from ..command import command_of
from ..conversion.models import open_pipeline
from ..files import UNFINISHED, check_folder, write_whole
from ..modeling_mmar.configuration_mmar import shorten
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.fingerprint import fingerprint
from ..training.mixture import stable_hash


MANIFEST_NAME = "drawing.json"
# Entries of drawing.json that make a run what it is, in words; the others say where it is from.
IDENTITY = {
    "model_sha256": "fingerprint of the model",
    "prompts_sha256": "fingerprint of the prompts",
    "num_pictures": "number of pictures",
    "seed": "seed",
    "arguments": "arguments of generation",
    "scheduler": "scheduler",
}
# Entries of a config that differ between versions and folders of one model.
PASSING = {"transformers_version", "auto_map", "custom_pipelines", "architectures"}
# The last chunk of a PNG file.
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# A process that is done waits for the slowest.
PATIENCE = datetime.timedelta(days=7)


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Processes:
    r"""
    The processes that draw into one folder.

    Args:
        number (`int`, *optional*, defaults to 1): How many there are.
        index (`int`, *optional*, defaults to 0): Which of them this is.
        local_index (`int`, *optional*, defaults to 0): Which of those of this machine.
    """

    number: int = 1
    index: int = 0
    local_index: int = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """As torchrun and `accelerate launch` started them; one, if neither did."""
        number, index, local_index = (
            int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
        )
        return cls(number, index, local_index)

    @property
    def is_first(self) -> bool:
        """Whether this one does what is done once."""
        return self.index == 0

    def wait(self) -> None:
        """Returns when all of them are here."""
        if self.number == 1:
            return
        if not torch.distributed.is_initialized():
            # Nothing but waiting is done together, for which the CPU will do.
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        torch.distributed.barrier()

    def leave(self) -> None:
        """Ends what `wait` began."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def device(self) -> torch.device:
        """The accelerator of this one, or the CPU."""
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        index = self.local_index % torch.accelerator.device_count()
        return torch.device(torch.accelerator.current_accelerator().type, index)


# -------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


def write_lines(path: Path, rows: list[Any]) -> None:
    """Writes rows as JSON, one a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path: Path, what: str) -> list[dict[str, Any]]:
    r"""
    Args:
        path (`Path`): A file with a JSON object on each line.
        what (`str`): What it holds, for messages.

    Returns:
        `list[dict]`: The objects.

    Raises:
        ValueError: If the file is missing, empty or no text, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"expected {what}; there is no file {shorten(str(path))}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected {what}, in UTF-8, in {shorten(str(path))}; got something else ({shorten(error)})."
        ) from error
    rows = []
    # Not `splitlines`, which cuts at some characters that JSON may have within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"expected a JSON object on line {number} of {shorten(str(path))}; got {shorten(error)}."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"expected a JSON object on line {number} of {shorten(str(path))}; got {shorten(line[:80])}."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"expected {what} in {shorten(str(path))}; it is empty.")
    return rows


def is_whole(picture: Path) -> bool:
    """Whether there is a PNG file with its end: one that was copied or synced in part has none."""
    if not picture.is_file() or picture.stat().st_size < len(PNG_END):
        return False
    with picture.open("rb") as file:
        file.seek(-len(PNG_END), os.SEEK_END)
        return file.read() == PNG_END


# -------------------------------------------------------------------------------------------------------- fingerprints


def _lasting(config: Any) -> Any:
    """A config without what differs between versions and folders of one model."""
    if not isinstance(config, Mapping):
        return config
    kept = {str(name): value for name, value in config.items() if name not in PASSING}
    return {name: _lasting(value) for name, value in kept.items() if not name.startswith("_")}


def model_sha256(model: nn.Module) -> str:
    r"""
    Args:
        model (`MMARForConditionalGeneration`): A model, on any device.

    Returns:
        `str`: SHA-256 of its config and of its weights, in their dtype and the order of their names.
    """
    return fingerprint(_lasting(model.config.to_dict()), model.state_dict())


def _describe(
    pipe: MMARPipeline, prompts: Mapping[str, str], seed: int, arguments: dict[str, Any], command: str | None
) -> dict[str, Any]:
    """What drawing.json says."""
    about = {
        "version": __version__,
        "command": command,
        "model_sha256": model_sha256(pipe.model),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest(),
        "num_pictures": len(prompts),
        "seed": seed,
        "arguments": {name: value for name, value in arguments.items() if value is not None},
        "scheduler": {"class": type(pipe.scheduler).__name__, **_lasting(dict(pipe.scheduler.config))},
    }
    # As it is read back: JSON knows no tuples.
    return json.loads(json.dumps(about, default=str))


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Writes drawing.json, unless there are pictures: to those belongs the one that must be there."""
    picture = next(folder.rglob("*.png"), None)
    if picture is None:
        write_json(folder / MANIFEST_NAME, about)
    elif not (folder / MANIFEST_NAME).exists():
        raise ValueError(
            f"expected a new folder, or one with a {MANIFEST_NAME}; {shorten(str(folder))} has none but holds "
            f"{shorten(str(picture))}. Name another folder, or remove this one."
        )


def _compare(folder: Path, about: dict[str, Any]) -> None:
    """Raises a `ValueError` if drawing.json tells of another run."""
    path = folder / MANIFEST_NAME
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in IDENTITY if begun[name] != about[name]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"expected {', '.join(IDENTITY)} in {shorten(str(path))}; it is no {MANIFEST_NAME} of drawings. Name "
            "another folder, or remove this one."
        ) from error
    if changed:
        differences = "; ".join(f"its {IDENTITY[name]} is {begun[name]}, now it is {about[name]}" for name in changed)
        raise ValueError(
            f"expected the model, prompts and arguments with which {shorten(str(folder))} was begun; {differences}. "
            "Give the same ones to go on, name another folder, or remove this one."
        )


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_pictures(
    pipe: MMARPipeline,
    prompts: Mapping[str, str],
    folder: str | Path,
    seed: int = 0,
    batch_size: int = 8,
    processes: Processes | None = None,
    command: str | None = None,
    **arguments: Any,
) -> int:
    r"""
    Draws a picture for each prompt, or those that are not there in whole yet, and returns when all processes have.

    Args:
        pipe (`MMARPipeline`): Draws, on the device where it is.
        prompts (`Mapping[str, str]`): Prompt of each picture, by the picture's file in `folder`, which ends in .png.
            Its number, on which its noise hangs, is its place in here.
        folder (`str` or `Path`): To draw into, or to go on with.
        seed (`int`, *optional*, defaults to 0): Of the run.
        batch_size (`int`, *optional*, defaults to 8): Pictures that are drawn at once. A kill loses one batch.
        processes (`Processes`, *optional*): Those that draw into the folder, this one alone by default: batch i is
            drawn by process i modulo their number.
        command (`str`, *optional*): How to go on from a shell; noted in drawing.json.
        **arguments: Of the pipeline: `guidance_scale`, `preset`, `num_ar_steps` and so on. None is its default.

    Returns:
        `int`: Pictures that this process has drawn; 0 if all were there.

    Raises:
        ValueError: If there are no prompts, an argument is out of range, or the folder holds another run's pictures.
        OSError: If a picture cannot be written; those before it stay.
    """
    folder, processes = Path(folder), processes or Processes()
    if not prompts:
        raise ValueError("expected at least one prompt to draw; got none.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    about = _describe(pipe, prompts, seed, arguments, command)
    if processes.is_first:
        _claim(folder, about)
    processes.wait()
    _compare(folder, about)

    files = list(prompts)
    missing = {i for i, name in enumerate(files) if not is_whole(folder / name)}
    num_batches = math.ceil(len(files) / batch_size)
    own = [range(i * batch_size, min((i + 1) * batch_size, len(files))) for i in range(num_batches)]
    own = [batch for batch in own[processes.index :: processes.number] if not missing.isdisjoint(batch)]
    num_drawn, bar_of_pipe = 0, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        total = sum(map(len, own))
        with tqdm(total=total, unit=" pictures", desc="drawing", disable=not processes.is_first) as bar:
            for batch in own:
                # In whole, though a kill may have left a part of it: rounding hangs on the batch.
                generators = [torch.Generator().manual_seed(stable_hash(seed, i)) for i in batch]
                images = pipe([prompts[files[i]] for i in batch], generator=generators, **arguments).images
                for i, image in zip(batch, images, strict=True):
                    if i in missing:
                        buffer = io.BytesIO()
                        image.save(buffer, "PNG")
                        write_whole(folder / files[i], buffer.getvalue())
                        num_drawn += 1
                bar.update(len(batch))
    finally:
        pipe.set_progress_bar_config(**bar_of_pipe)
    processes.wait()
    if processes.is_first:
        # What a kill has left.
        for leftover in folder.rglob(f".*{UNFINISHED}"):
            leftover.unlink(missing_ok=True)
    return num_drawn


# ------------------------------------------------------------------------------------------------------------- command


OPTIONS = ("guidance_scale", "preset", "num_ar_steps", "num_inference_steps")


@dataclass(frozen=True)
class DrawingOptions:
    r"""
    What the commands that draw have in common.

    Args:
        model (`str`): Folder or Hub id of an MMAR.
        out (`Path`): Folder to draw into, or to go on with.
        seed (`int`): Of the run.
        batch_size (`int`): Images drawn at once.
        dtype (`str`, *optional*): Of the weights; float32 on a CPU by default, as saved elsewhere.
        guidance_scale, preset, num_ar_steps, num_inference_steps (*optional*): As for the pipeline; the model's by
            default.
    """

    model: str
    out: Path
    seed: int
    batch_size: int
    dtype: str | None
    guidance_scale: float | None
    preset: str | None
    num_ar_steps: int | None
    num_inference_steps: int | None

    def command(self, *words: str, **more: Any) -> str:
        """The command line with which a command is started again: what was given, and the defaults."""
        options = asdict(self)
        return command_of(*words, options.pop("model"), **options, **more)


def draw_with(drawing: DrawingOptions, prompts: Mapping[str, str], processes: Processes, command: str) -> str:
    r"""
    Generates images as the options of a command say.

    Args:
        drawing (`DrawingOptions`): How.
        prompts (`Mapping[str, str]`): As in `draw_pictures`.
        processes (`Processes`): Those that draw.
        command (`str`): How to go on.

    Returns:
        `str`: The model's fingerprint, as drawing.json has it.
    """
    check_folder(drawing.out)
    dtype = None if drawing.dtype is None else getattr(torch, drawing.dtype)
    pipe = open_pipeline(drawing.model, dtype=dtype, device=processes.device)
    options = {name: getattr(drawing, name) for name in OPTIONS}
    draw_pictures(pipe, prompts, drawing.out, drawing.seed, drawing.batch_size, processes, command, **options)
    return json.loads((drawing.out / MANIFEST_NAME).read_text(encoding="utf-8"))["model_sha256"]


def spread(rows: list[Any], number: int | None, name: str) -> list[tuple[int, Any]]:
    r"""
    Args:
        rows (`list`): All rows.
        number (`int`, *optional*): How many to take; all by default.
        name (`str`): The argument that says so, for messages.

    Returns:
        `list[tuple[int, Any]]`: As many rows, spread evenly, with their places.

    Raises:
        ValueError: If there are not so many.
    """
    number = len(rows) if number is None else number
    if not 1 <= number <= len(rows):
        raise ValueError(f"`{name}` must be between 1 and {len(rows)}, all there are; got {number}.")
    places = [i * len(rows) // number for i in range(number)]
    return [(place, rows[place]) for place in places]

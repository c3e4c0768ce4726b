"""
Checkpoints that are whole or not there.

A checkpoint is written into a folder of another name, which is renamed when all of it is on the disk, and loses its
name before it is removed. So a training that is killed at any moment, or whose disk is full, leaves its earlier
checkpoints as they were.
"""

import functools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling_mmar.configuration_mmar import shorten


# Where a checkpoint is written; `get_last_checkpoint` and, with the underscore, uploads to the Hub pass over it.
SAVING_FOLDER = "_saving"
# Locked while a training runs; the underscore as above.
LOCK_FILE = "_lock"
# Names and sizes of a checkpoint's files.
MANIFEST_FILE = "manifest.json"


def saving_folder(output_dir: str | Path) -> Path:
    """The folder in which a new checkpoint of `output_dir` is written."""
    return Path(output_dir) / SAVING_FOLDER


@contextmanager
def claimed(output_dir: str | Path, is_main_process: bool = True) -> Iterator[None]:
    r"""
    Within the context `output_dir` is this training's alone. The kernel frees it when the process ends, also of a
    SIGKILL.

    Args:
        output_dir (`str` or `Path`): Folder of a training; made if it is missing.
        is_main_process (`bool`, *optional*, defaults to `True`): The other processes of the training claim nothing.

    Raises:
        ValueError: If another training runs there.
    """
    if not is_main_process:
        yield
        return
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    # One lock per process, which may be claimed again by who has it.
    lock = FileLock(Path(output_dir).resolve() / LOCK_FILE, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"`output_dir` must be of one training at a time; another one runs in {shorten(str(output_dir))}. Wait "
            "for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def find_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of the tensors that holds NaN or infinity."""
    for name, value in tensors:
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            return name
    return None


def check_weights(tensors: Iterable[tuple[str, Tensor]], remedy: str) -> None:
    r"""
    Looks at weights before they are saved.

    Args:
        tensors (`Iterable[tuple[str, Tensor]]`): The weights and their names.
        remedy (`str`): What to do, for the message.

    Raises:
        ValueError: If one holds NaN or infinity.
    """
    if (name := find_non_finite(tensors)) is not None:
        raise ValueError(f"expected finite weights to save; {name} holds NaN or infinity. {remedy}")


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, such as an optimizer's state."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}".lstrip("."))


@functools.lru_cache(maxsize=1024)
def _file_error(file: str, size: int, modified: int) -> str | None:
    """Why a file of tensors cannot be used; it is read once per process as long as its size and time stay."""
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                name = find_non_finite((name, opened.get_tensor(name)) for name in opened.keys())
        else:
            with safe_globals():  # NumPy's random state
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            name = find_non_finite(_tensors(state))
    except pickle.UnpicklingError:
        return "holds other things than numbers, which were not read"
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        return f"is broken or cut off ({shorten(error)})"
    return None if name is None else f"holds NaN or infinity in {name}"


def finish(written: Path, target: Path) -> None:
    """
    Gives a checkpoint in a `saving_folder` its manifest and name, once all of it is on the disk; an older one of that
    name goes, and so does the folder.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in files}
    manifest = written / MANIFEST_FILE
    manifest.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for path in (*files, manifest, written):
        _sync(path)
    replaced = written.with_name(f"{target.name}.replaced")
    if target.exists():
        os.rename(target, replaced)
    os.rename(written, target)
    _sync(target.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(checkpoint: str | Path) -> str | None:
    r"""
    What is wrong with a checkpoint, from its files' names and sizes, and the numbers of weights and optimizer.

    Args:
        checkpoint (`str` or `Path`): Folder of a checkpoint, with a manifest or as transformers' `Trainer` writes it.

    Returns:
        `str` or None: Words for a message; None for a checkpoint that is whole.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({error})"
    if (checkpoint / MANIFEST_FILE).is_file():
        try:
            sizes = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        # OSError: a training that still runs may remove it meanwhile.
        except (OSError, ValueError, RecursionError) as error:
            return f"{MANIFEST_FILE} cannot be read ({error})"
        for name, size in sizes.items():
            try:
                found = (checkpoint / name).stat().st_size
            except OSError:
                return f"{name} is missing"
            if found != size:
                return f"{name} has {found} bytes in place of {size}"
    patterns = ("*.safetensors", "*.pt", "*.pth")
    for path in sorted(path for pattern in patterns for path in checkpoint.glob(pattern)):
        try:
            state = path.stat()
        except OSError:
            return f"{path.name} is missing"
        if (wrong := _file_error(str(path), state.st_size, state.st_mtime_ns)) is not None:
            return f"{path.name} {wrong}"
    # A training that still runs may have removed it meanwhile, and what is not there has no fault.
    return None if (checkpoint / TRAINER_STATE_NAME).is_file() else f"{TRAINER_STATE_NAME} is missing"


def rotate(output_dir: str | Path, limit: int | None, kept: Collection[str | Path] = ()) -> None:
    r"""
    Removes the oldest checkpoints. Each loses its name first: one that is half removed is none.

    Args:
        output_dir (`str` or `Path`): Folder of a training.
        limit (`int`, *optional*): How many stay, the newest and those of `kept` among them; all for None or 0.
        kept (`Collection[str | Path]`, *optional*, defaults to `()`): Checkpoints that stay, also beyond the limit:
            the best one, say.
    """
    if not limit or limit < 0:
        return
    folders = _numbered(output_dir)
    kept = {Path(path) for path in kept}
    staying = {number for number, folder in folders.items() if folder in kept} | set(sorted(folders)[-1:])
    others = sorted(set(folders) - staying)
    for number in others[: max(0, len(folders) - max(limit, len(staying)))]:
        removed = saving_folder(output_dir) / f"{folders[number].name}.removed"
        removed.parent.mkdir(exist_ok=True)
        os.rename(folders[number], removed)
        shutil.rmtree(removed.parent)


def _numbered(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder by their numbers of steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    folders = [path for path in Path(output_dir).glob(f"{prefix}*") if path.is_dir()]
    return {int(number): path for path in folders if (number := path.name.removeprefix(prefix)).isdecimal()}


def num_steps(checkpoint: str | Path) -> int:
    """Steps that a checkpoint was trained for."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def best_checkpoint(checkpoint: str | Path) -> str:
    """The checkpoint beside this one that was the best so far; this one if none was measured, or it is gone."""
    best = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
    # The folder of all of them may have moved.
    folder = None if best is None else Path(checkpoint).with_name(Path(best).name)
    return str(folder if folder is not None and folder.is_dir() else checkpoint)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    r"""
    The newest checkpoint that is whole; warns of newer ones that are not.

    Args:
        output_dir (`str` or `Path`): Folder of a training; it need not exist.

    Returns:
        `str` or None: Folder of the checkpoint, if there is one.
    """
    numbered = _numbered(output_dir)
    for number in sorted(numbered, reverse=True):
        wrong = fault(numbered[number])
        if wrong is None:
            return str(numbered[number])
        warnings.warn(f"{numbered[number]} is not whole: {wrong}. It is passed over.", stacklevel=2)
    return None

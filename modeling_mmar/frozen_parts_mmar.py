"""
Frozen parts by reference: a folder that holds what was trained, and names where Qwen2 and the VAE are.

`config.frozen_parts` says where they come from, for example

    {"backbone": {"repo_id": "Qwen/Qwen2-7B-Instruct", "revision": "f2826a00..."}, "vae": {"repo_id": "runs/kl16"}}

A reference is a repository at one commit, or a local folder with the SHA-256 of each weights file.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_mmar import shorten, shorten_names


# Where each part's weights are in MMAR, and under which beginnings in their own files.
PREFIXES = {
    "backbone": {"model.language_model.": "model.", "lm_head.": "lm_head."},
    "vae": {"vae.": ""},
}
# Trained, though inside the backbone.
TRAINED_SUFFIXES = (".image_A", ".image_B")
# As transformers takes it: patterns of names in the parts' files -> names in MMAR.
KEY_MAPPING = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^(encoder|decoder|quant_conv|post_quant_conv|quantize)\.": r"vae.\1.",
}
WEIGHTS_NAMES = {
    "backbone": (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
}
# Arguments of `from_pretrained` that say where and how to download.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def part_of(name: str, parts: Any) -> str | None:
    r"""
    Args:
        name (`str`): Name of one of MMAR's weights.
        parts: The frozen parts that count.

    Returns:
        `str` or None: The frozen part that the weight belongs to.
    """
    if name.endswith(TRAINED_SUFFIXES):
        return None
    return next((part for part in parts if name.startswith(tuple(PREFIXES[part]))), None)


def make_reference(part: str, repo_id: str, folder: str | Path, revision: str | None = None) -> dict[str, Any]:
    r"""
    Makes the reference to a part that was just read.

    Args:
        part (`str`): `"backbone"` or `"vae"`.
        repo_id (`str`): Repository or local folder.
        folder (`str` or `Path`): Where its files lie; for a repository, a snapshot of the cache.
        revision (`str`, *optional*): Branch, tag or commit; for a repository the snapshot's commit is taken.

    Returns:
        `dict`: `repo_id` with the commit as `revision`, or with `sha256` of each weights file of a local folder.
    """
    if not Path(repo_id).is_dir():
        # The cache keeps each commit in a folder of its name.
        is_snapshot = Path(folder).parent.name == "snapshots"
        return {"repo_id": repo_id, "revision": Path(folder).name if is_snapshot else revision}
    return {
        "repo_id": str(Path(repo_id).absolute()),
        "sha256": {file.name: sha256_of(file) for file in weights_files(part, Path(folder))},
    }


def complete_references(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    r"""
    Makes references to local folders that were written by hand hold anywhere on this machine, for these very weights.

    Args:
        parts (`dict`): References by part; a local folder may be relative and have no hashes.

    Returns:
        `dict`: The same, with absolute folders and the hashes of their files; repositories as they are.

    Raises:
        ValueError: If a local folder lacks weights files.
    """
    completed = {}
    for part, reference in parts.items():
        folder = Path(reference["repo_id"])
        if reference.get("revision") is not None or not folder.is_dir():
            completed[part] = reference
        elif reference.get("sha256"):
            completed[part] = {**reference, "repo_id": str(folder.absolute())}
        else:
            completed[part] = make_reference(part, str(folder), folder)
    return completed


def is_local_reference(reference: dict[str, Any]) -> bool:
    """Whether a reference names a folder and not a repository."""
    if reference.get("sha256") is not None or Path(reference["repo_id"]).is_absolute():
        return True
    return reference.get("revision") is None and Path(reference["repo_id"]).is_dir()


def weights_files(part: str, folder: Path) -> list[Path]:
    r"""
    The weights files of a part.

    Args:
        part (`str`): `"backbone"` or `"vae"`.
        folder (`Path`): A local folder of the part.

    Returns:
        `list[Path]`

    Raises:
        ValueError: If there are none, or one is missing.
    """
    single, index = WEIGHTS_NAMES[part]
    names = [single]
    if not (folder / single).is_file() and (folder / index).is_file():
        names = names_in_index(folder / index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"expected the {part}'s weights files {', '.join(names)} in {shorten(str(folder))}; {', '.join(missing)} "
            "missing. Only safetensors are read. Copy or download the folder whole."
        )
    return [folder / name for name in names]


def names_in_index(index: Path) -> list[str]:
    r"""
    The weights files that the index of a folder names.

    Args:
        index (`Path`): The index.

    Returns:
        `list[str]`: Their names, in order.

    Raises:
        ValueError: If it cannot be read, or names a file outside its folder, which would be read as weights.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected the names of the weights files in {shorten(str(index))}; it cannot be read "
            f"({shorten(repr(error))}). Copy or download it again."
        ) from error
    if outside:
        raise ValueError(
            f"{shorten(str(index))} must name weights files in its own folder; got {shorten_names(outside)}. Do not "
            "load a folder of somebody else that does."
        )
    return names


def open_weights(file: Path) -> Any:
    """Opens a safetensors file to read tensor by tensor; raises a `ValueError` if it is missing, broken or cut off."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"expected whole safetensors in {shorten(str(file))}; got a missing, broken or truncated file "
            f"({shorten(error)}). Copy or download it again."
        ) from error


def apply_umask(folder: str | Path) -> None:
    r"""
    Gives the weights files of a folder the permissions that other new files have; safetensors writes them for their
    owner alone.

    Args:
        folder (`str` or `Path`): Where they were written.
    """
    files = [file for file in Path(folder).glob("*.safetensors") if stat.S_IMODE(file.stat().st_mode) == 0o600]
    if not files:
        return
    # To ask for the umask is to change it, for all threads.
    probe = Path(folder) / f".{uuid.uuid4().hex}"
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        file.chmod(mode)


def fetch_part(part: str, reference: dict[str, Any], **download: Any) -> list[Path]:
    r"""
    Finds or downloads the weights of a part.

    Args:
        part (`str`): `"backbone"` or `"vae"`.
        reference (`dict`): As in `config.frozen_parts`.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Returns:
        `list[Path]`: Its weights files.

    Raises:
        ValueError: If the repository, the revision or a file is gone or out of reach, or a file has another hash.
    """
    repo_id, revision = reference["repo_id"], reference.get("revision")
    is_local = is_local_reference(reference)
    what = f"the {part} of this model, which it names by reference, from {repo_id!r}"
    if revision is not None:
        what += f" at revision {revision}"
    if is_local and not Path(repo_id).is_dir():
        raise ValueError(
            f"expected {what}; there is no such folder here. Copy it to that place, or set "
            f"`config.frozen_parts[{shorten(part)}]` to where it is."
        )
    if is_local:
        files = weights_files(part, Path(repo_id))
        hashes = reference.get("sha256") or {}
        if hashes and (unknown := [file.name for file in files if file.name not in hashes]):
            raise ValueError(
                f"expected {what} with the SHA-256 of each of its files; {', '.join(unknown)} missing in "
                f"`config.frozen_parts[{shorten(part)}]['sha256']`. Complete it, or leave `sha256` out."
            )
        for file in files:
            expected = hashes.get(file.name)
            if expected is not None and (got := sha256_of(file)) != expected:
                raise ValueError(
                    f"expected {what}; {shorten(str(file))} has changed: its SHA-256 is {got}, not {expected}. "
                    "Restore the file, or save the model again with the part that it was trained with."
                )
        return files
    patterns = [name.replace(".safetensors", "*.safetensors") for name in WEIGHTS_NAMES[part][:1]]
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=[*patterns, WEIGHTS_NAMES[part][1]], **download
        )
    except (RevisionNotFoundError, RepositoryNotFoundError, GatedRepoError) as error:
        reasons = {RevisionNotFoundError: "that revision is gone", GatedRepoError: "access to it must be asked for"}
        reason = reasons.get(type(error), "there is no such repository or it is private")
        raise ValueError(
            f"expected {what}; {reason}. Pass a `token` that may read it, or set "
            f"`config.frozen_parts[{shorten(part)}]` to a copy."
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"expected {what}; that is neither a repository's name nor an absolute path. Set "
            f"`config.frozen_parts[{shorten(part)}]`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"expected {what}; it is not in the cache and the Hub cannot be reached ({type(error).__name__}). "
            "Connect, or download it first."
        ) from error
    return weights_files(part, Path(folder))


@contextlib.contextmanager
def joined_folder(
    own: str | os.PathLike,
    parts: dict[str, dict[str, Any]],
    revision: str | None = None,
    subfolder: str = "",
    **download,
) -> Iterator[Path]:
    r"""
    A folder from which transformers loads the trained weights and the frozen parts together, without copying them.

    Args:
        own (`str` or `os.PathLike`): Folder or repository of the trained weights.
        parts (`dict`): References by part, as in `config.frozen_parts`.
        revision (`str`, *optional*): Of that repository.
        subfolder (`str`, *optional*, defaults to `""`): In it.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Yields:
        `Path`: Its index names the weights files by their absolute paths. To be loaded with `KEY_MAPPING`.

    Raises:
        ValueError: If a part cannot be had.
    """
    folder = Path(own)
    if not folder.is_dir():
        inside = f"{subfolder}/" if subfolder else ""
        folder = Path(
            snapshot_download(
                str(own), revision=revision, allow_patterns=[f"{inside}*.safetensors", f"{inside}*.json"], **download
            )
        )
    folder = folder / subfolder
    files = weights_files("backbone", folder)
    for part, reference in parts.items():
        files += fetch_part(part, reference, **download)
    weight_map = {}
    for file in files:
        with open_weights(file) as opened:
            weight_map |= dict.fromkeys(opened.keys(), str(file.absolute()))
    with tempfile.TemporaryDirectory() as joined:
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                (Path(joined) / name).write_bytes((folder / name).read_bytes())
        index = {"metadata": {}, "weight_map": weight_map}
        (Path(joined) / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        yield Path(joined)


def check_unchanged(state: dict[str, Tensor], parts: dict[str, dict[str, Any]], **download: Any) -> None:
    r"""
    Makes sure that nothing is lost when frozen weights are left out.

    Args:
        state (`dict[str, Tensor]`): The model's weights.
        parts (`dict`): References by part.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Raises:
        ValueError: If a weight differs from the one that its reference names.
    """
    given = set()
    for part, reference in parts.items():
        for file in fetch_part(part, reference, **download):
            with open_weights(file) as opened:
                for source in opened.keys():
                    name = _name_in_mmar(part, source)
                    given.add(name)
                    value = state.get(name)
                    if value is None or value.device.type == "meta":
                        continue  # tied, or offloaded: it was not trained
                    expected = opened.get_tensor(source).to(value.dtype)
                    if expected.shape != value.shape or not torch.equal(expected, value.detach().cpu()):
                        raise ValueError(
                            f"expected the {part} of {shorten(reference['repo_id'])}, to be left out of what is "
                            "saved; "
                            f'{name} is another. It was trained or replaced: save with `frozen="include"`.'
                        )

    if left := sorted(name for name in state if part_of(name, parts) is not None and name not in given):
        raise ValueError(
            f"expected references that give all weights to be left out of what is saved; {len(left)} are not there, "
            f'among them {", ".join(left[:3])}. Save with `frozen="include"`.'
        )


def _name_in_mmar(part: str, source: str) -> str:
    for name, own in PREFIXES[part].items():
        if source.startswith(own):
            return name + source.removeprefix(own)
    return source


def sha256_of(file: str | Path) -> str:
    """SHA-256 of a file, in hex; computed once per process as long as the file's size and time of change stay."""
    state = Path(file).stat()
    return _sha256(str(Path(file).resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(file: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

"""
Pictures encoded once: a command writes the latents of a source and of its views, a training reads them row by row.

    mmar cache-latents DATA --model MODEL --out runs/latents --num_copies 3 --num_workers 4
    torchrun --nproc_per_node 8 -m mmar cache-latents DATA --model MODEL --out runs/latents

DATA is whatever `sources.open_source` opens. A run that was stopped is started again with the same words and goes on
where it was; its files are, byte by byte, those of a run that was not stopped. The folder holds

    index.json                          what was encoded, by which VAE, and how
    latents-00000-of-00012.safetensors  shards of R rows: mean and std of the latents' posterior in half precision,
        picture (R, 1 + K, 2, C, h, w)  of the picture itself, and of K moved copies
        content (R, K, 2, C, h, w)      of K copies that were redrawn and moved, if an answer hangs on the content
        broken (R,)                     True where a row has no picture that can be read; its latents are 0
    broken.json                         those rows, with the reasons

Views that show a style are mixed from other rows' latents when a sample is drawn, and so are not here.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import __version__
from ..command import command_of
from ..conversion.models import open_model, open_processor
from ..files import UNFINISHED, write_whole
from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..processors.image_processing_mmar import DEFAULTS, MMARImageProcessor, read_image_file
from ..processors.processing_mmar import MMARProcessor
from .fingerprint import fingerprint
from .mixture import stable_hash
from .rows import BadRow, as_bad_row, open_pictures, pictures_of
from .sources import Source, open_source
from .views import KINDS, distort, restyle


INDEX_NAME, BROKEN_NAME = "index.json", "broken.json"
# Entries of index.json that make a cache what it is, in words; the others say where it is from.
IDENTITY = {
    "num_rows": "number of rows",
    "pictures_sha256": "fingerprint of the pictures",
    "vae_sha256": "fingerprint of the VAE",
    "image_processor": "image processor",
    "latent_shape": "shape of the latents",
    "num_copies": "number of copies",
    "kinds": "number of views per kind",
    "seed": "seed",
    "shard_size": "shard size",
}
# safetensors writes the entries of its metadata in any order, so all is in one.
METADATA_KEY = "mmar"
# Rows, evenly spaced, whose pictures tell one source from another.
FINGERPRINT_ROWS = 1024
# Shards whose headers a reader keeps.
MAX_OPEN_SHARDS = 1024
# Of a reason in the files, and of the reasons that are printed.
MAX_REASON_LENGTH, MAX_REASONS_SHOWN = 300, 5


# ------------------------------------------------------------------------------------------------------- fingerprints


def vae_sha256(model: MMARForConditionalGeneration) -> str:
    r"""
    Args:
        model (`MMARForConditionalGeneration`): A model, on any device.

    Returns:
        `str`: SHA-256 of its VAE's weights, in the order of their names, and of its config with the latent scale.
    """
    # Without defaults: another version of diffusers may have more of them.
    defaults = {name: entry.default for name, entry in inspect.signature(AutoencoderKL.__init__).parameters.items()}
    # As JSON, which knows no tuples.
    config, defaults = (json.loads(json.dumps(d, default=repr)) for d in (dict(model.vae.config), defaults))
    config = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and (name not in defaults or value != defaults[name])
    }
    return fingerprint(config, model.vae.state_dict())


def pictures_sha256(source: Source) -> str:
    r"""
    Tells a source's pictures from others without reading all of them.

    Args:
        source (`Source`): Training rows.

    Returns:
        `str`: SHA-256 of the number of rows and, for up to `FINGERPRINT_ROWS` of them, evenly spaced, of the
        picture's file and of what the answers hang on. Captions may be mended: the latents stay theirs.
    """
    num_rows = len(source)
    num_seen = min(num_rows, FINGERPRINT_ROWS)
    digest = hashlib.sha256(str(num_rows).encode())
    for i in range(num_seen):
        digest.update(_row_sha256(source, i * (num_rows - 1) // max(1, num_seen - 1)))
    return digest.hexdigest()


def _row_sha256(source: Source, index: int) -> bytes:
    digest = hashlib.sha256()
    try:
        row = source[index]
        with as_bad_row(f"row {index}"):
            for picture in pictures_of(row):
                if isinstance(picture, Image.Image):
                    digest.update(f"{picture.mode} {picture.size}".encode())
                    picture = picture.tobytes()
                elif not isinstance(picture, bytes) and os.path.isfile(picture):
                    picture = read_image_file(Path(picture))
                digest.update(picture if isinstance(picture, bytes) else str(picture).encode())
    except BadRow:
        return digest.digest()
    digest.update(json.dumps(row.get("depends_on") or []).encode())
    return digest.digest()


def _name_of(source: Source) -> str:
    """For reports; a list of rows has none."""
    return getattr(source, "name", type(source).__name__)


# ------------------------------------------------------------------------------------------------------------- folder


def _read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a folder; raises a `ValueError` if there is none or it is no index."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"expected a folder of latents; there is no {shorten(str(path))}. `mmar cache-latents` makes one."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in {shorten(str(path))}; it is broken ({shorten(error)}). Remove the folder."
        ) from error
    expected = {*IDENTITY, "version", "command", "source"}
    if not isinstance(index, dict) or not expected <= index.keys():
        raise ValueError(
            f"expected {', '.join(sorted(expected))} in {shorten(str(path))}; it is no index of latents. Name another "
            "folder."
        )
    kinds, shape = index["kinds"], index["latent_shape"]
    counts = [index["num_rows"], index["shard_size"]]
    counts += kinds.values() if isinstance(kinds, dict) and "picture" in kinds else [0]
    counts += shape if isinstance(shape, list) and len(shape) == 3 else [0]
    if not all(type(count) is int and 0 < count < 2**63 for count in counts):
        raise ValueError(
            f"`num_rows`, `shard_size`, `latent_shape` and `kinds` must be numbers above 0 in {str(path)!r}; got "
            f"{shorten({name: index[name] for name in ('num_rows', 'shard_size', 'latent_shape', 'kinds')})}. Remove "
            "the folder."
        )
    return index


def _num_shards(index: dict[str, Any]) -> int:
    return -(-index["num_rows"] // index["shard_size"])


def _shard_rows(index: dict[str, Any], shard: int) -> range:
    """The numbers of a shard's rows."""
    return range(shard * index["shard_size"], min((shard + 1) * index["shard_size"], index["num_rows"]))


def _shard_path(folder: Path, index: dict[str, Any], shard: int) -> Path:
    return folder / f"latents-{shard:05d}-of-{_num_shards(index):05d}.safetensors"


def _identity_sha256(index: dict[str, Any]) -> str:
    """Which cache a shard belongs to."""
    return hashlib.sha256(json.dumps({name: index[name] for name in IDENTITY}, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Shard:
    """
    A shard as it was when it was opened. Its rows are read by seeking: a mapped file that is cut meanwhile would end
    the process.
    """

    path: Path
    size: int
    modified: int
    # Of each kind: where its rows begin, in bytes, and the shape of one.
    places: dict[str, tuple[int, tuple[int, ...]]]
    is_broken: tuple[bool, ...]
    broken: list[dict[str, Any]]

    def read(self, row: int) -> dict[str, Tensor]:
        """The latents of one of its rows; raises a `ValueError` if the file is not what it was."""
        data = {}
        try:
            with open(self.path, "rb") as file:
                for kind, (start, shape) in self.places.items():
                    num_bytes = torch.half.itemsize * math.prod(shape)
                    file.seek(start + row * num_bytes)
                    data[kind] = bytearray(file.read(num_bytes))  # which a tensor may write to
                state = os.fstat(file.fileno())
        except OSError as error:
            raise ValueError(
                f"expected the shard {str(self.path)!r}, which was there at the start; it cannot be read any more "
                f"({shorten(error)}). Put it back and start again."
            ) from error
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(
                f"expected {str(self.path)!r} as it was at the start; it has changed since. Encode its rows again, "
                "with the command that made them, and start again."
            )
        shapes = {kind: shape for kind, (_, shape) in self.places.items()}
        return {kind: torch.frombuffer(data[kind], dtype=torch.half).view(shapes[kind]) for kind in data}


def _open_shard(folder: Path, index: dict[str, Any], shard: int) -> _Shard:
    """
    A shard, and what it says of its broken rows. Raises a `ValueError` if the file is missing, truncated, another
    cache's or another shard's, of which its header tells.
    """
    path = _shard_path(folder, index, shard)
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > state.st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_size))
            first = 8 + header_size
            about = json.loads(header.pop("__metadata__")[METADATA_KEY])
            entries = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            if first + max(end for _, end in spans.values()) != state.st_size:
                raise ValueError("its size is not what its header says")
            file.seek(first + spans["broken"][0])
            is_broken = tuple(map(bool, file.read(spans["broken"][1] - spans["broken"][0])))
    except FileNotFoundError as error:
        raise ValueError(f"expected the shard {shorten(str(path))}; it is missing. {_how_to_finish(index)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected a shard of latents at {shorten(str(path))}; it is truncated or broken ({shorten(error)}). "
            f"Remove that file. {_how_to_finish(index)}"
        ) from error
    num_rows = len(_shard_rows(index, shard))
    expected = {kind: ("F16", (num_rows, n, 2, *index["latent_shape"])) for kind, n in index["kinds"].items()}
    expected["broken"] = ("BOOL", (num_rows,))
    sizes = {name: math.prod(shape) * (2 if dtype == "F16" else 1) for name, (dtype, shape) in expected.items()}
    if (
        (about.get("cache"), about.get("shard")) != (_identity_sha256(index), shard)
        or entries != expected
        or {name: end - start for name, (start, end) in spans.items()} != sizes
    ):
        raise ValueError(
            f"expected shard {shard} of these latents at {shorten(str(path))}; it is another source's or shard's, or "
            f"made with another VAE or other options than {INDEX_NAME} has. Remove that file. {_how_to_finish(index)}"
        )
    places = {kind: (first + spans[kind][0], entries[kind][1][1:]) for kind in index["kinds"]}
    return _Shard(path, state.st_size, state.st_mtime_ns, places, is_broken, about["broken"])


def _how_to_finish(index: dict[str, Any]) -> str:
    if index["command"] is None:
        return "Call `cache_latents` with the same arguments to go on."
    return f"To go on: {index['command']}"


# ------------------------------------------------------------------------------------------------------------- writing


class _RowViews(Dataset):
    """Row number -> itself and the pixels `(V, 3, H, W)` of its picture and views, or a dict that says why not."""

    def __init__(self, source: Source, image_processor: MMARImageProcessor, kinds: dict[str, int], seed: int):
        self.source, self.image_processor, self.kinds, self.seed = source, image_processor, kinds, seed

    def __getitem__(self, index: int) -> tuple[int, Tensor | dict[str, Any]]:
        row: dict[str, Any] = {}
        try:
            row = self.source[index]
            with as_bad_row(f"row {index}"):
                if len(pictures_of(row)) != 1:
                    raise BadRow(f"expected one picture, since latents are kept by row; got {len(pictures_of(row))}.")
                pictures = open_pictures(row)
                for kind, count in self.kinds.items():
                    num_views = count - 1 if kind == "picture" else count
                    pictures += [self._view(pictures[0], kind, index, copy) for copy in range(num_views)]
                return index, self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        except BadRow as error:
            return index, _broken(index, row, str(error))

    def _view(self, picture: Image.Image, kind: str, index: int, copy: int) -> Image.Image:
        # Views draw from the global generator; each gets a seed of its own, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_hash(self.seed, index, KINDS.index(kind), copy))
            try:
                return distort(restyle(picture) if kind == "content" else picture)
            except ValueError as error:
                raise BadRow(
                    f"no view of its picture of {picture.size} pixels can be drawn: {shorten(error)}."
                ) from error


def _broken(index: int, row: dict[str, Any], reason: str) -> dict[str, Any]:
    """What broken.json says of a row."""
    # Pillow names objects by their address, which would make each run's files different.
    reason = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(reason.split()))[:MAX_REASON_LENGTH]
    name = row.get("id")
    return {"row": index, "id": name if name is None or isinstance(name, int) else str(name), "reason": reason}


def _batches(shards: list[int], index: dict[str, Any], batch_rows: int) -> Iterator[list[int]]:
    """Row numbers, batch by batch; no batch lies in two shards, so that a shard's bytes hang on no other."""
    for shard in shards:
        rows = _shard_rows(index, shard)
        for start in range(0, len(rows), batch_rows):
            yield list(rows[start : start + batch_rows])


def _collate(
    items: list[tuple[int, Tensor | dict[str, Any]]],
) -> tuple[list[int], Tensor | None, dict[int, dict[str, Any]]]:
    """Row numbers, the pixel values of the good rows one after the other, and the broken rows."""
    good = [item for _, item in items if isinstance(item, Tensor)]
    broken = {index: item for index, item in items if not isinstance(item, Tensor)}
    return [index for index, _ in items], torch.cat(good) if good else None, broken


def cache_latents(
    source: Source,
    model: MMARForConditionalGeneration,
    processor: MMARProcessor,
    folder: str | Path,
    num_copies: int = 0,
    shard_size: int = 2048,
    batch_size: int = 64,
    seed: int = 0,
    num_workers: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    command: str | None = None,
) -> list[dict[str, Any]] | None:
    r"""
    Encodes the pictures of a source, or those of its shards that are not there yet.

    Args:
        source (`Source`): Training rows of one picture each; a list of them will do.
        model (`MMARForConditionalGeneration`): Its frozen VAE encodes, on the device where it is.
        processor (`MMARProcessor`): Its image processor makes pixels.
        folder (`str` or `Path`): To write to, or to go on with.
        num_copies (`int`, *optional*, defaults to 0): Views per picture and kind, K.
        shard_size (`int`, *optional*, defaults to 2048): Rows per file, R.
        batch_size (`int`, *optional*, defaults to 64): Pictures and views per pass of the VAE.
        seed (`int`, *optional*, defaults to 0): Of the views; each is a function of it, of its row and its number.
        num_workers (`int`, *optional*, defaults to 0): Processes that open pictures and draw views for this one, which
            does it itself if there are none.
        num_processes (`int`, *optional*, defaults to 1): Processes that encode into the same folder.
        process_index (`int`, *optional*, defaults to 0): Which of them this is: it writes every `num_processes`-th
            shard from this one on.
        command (`str`, *optional*): How to go on from a shell, for messages.

    Returns:
        `list[dict]`: The broken rows, each with `row`, `id` and `reason`; None while shards of other processes are
        missing.

    Raises:
        ValueError: If an argument is out of range, the source has no rows, the folder was begun with another source,
            VAE or other options, or all rows are broken.
        OSError: If a file cannot be written; the shards before it stay.
    """
    folder = Path(folder)
    for name, value, least in (
        ("num_copies", num_copies, 0),
        ("shard_size", shard_size, 1),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(
            f"`process_index` must be in [0, `num_processes`); got {process_index} with {num_processes} processes."
        )
    index = _begin(folder, source, model, processor, num_copies, shard_size, seed, command)
    own = range(process_index, _num_shards(index), num_processes)
    missing = [shard for shard in own if not _is_done(folder, index, shard)]
    batch_rows = max(1, batch_size // sum(index["kinds"].values()))
    loader = DataLoader(
        _RowViews(source, processor.image_processor, index["kinds"], seed),
        batch_sampler=_batches(missing, index, batch_rows),
        collate_fn=_collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # otherwise it draws from the global one
    )
    encoded: list[Tensor] = []
    broken: dict[int, dict[str, Any]] = {}
    num_broken = 0
    num_rows = sum(len(_shard_rows(index, shard)) for shard in missing)
    with tqdm(total=num_rows, unit=" rows", desc="latents", delay=2) as bar:
        for rows, pixel_values, unread in loader:
            broken |= unread
            encoded.append(_encode(model, rows, pixel_values, broken, index))
            bar.update(len(rows))
            bar.set_postfix(broken=num_broken + len(broken))
            shard = rows[0] // shard_size
            if rows[-1] == _shard_rows(index, shard)[-1]:
                path = _shard_path(folder, index, shard)
                for leftover in folder.glob(f".{path.name}.*{UNFINISHED}"):
                    leftover.unlink()
                write_whole(path, _shard_bytes(torch.cat(encoded), _shard_rows(index, shard), broken, index))
                num_broken += len(broken)
                encoded, broken = [], {}
    return _finish(folder, index)


def _begin(
    folder: Path,
    source: Source,
    model: MMARForConditionalGeneration,
    processor: MMARProcessor,
    num_copies: int,
    shard_size: int,
    seed: int,
    command: str | None,
) -> dict[str, Any]:
    """Writes index.json, or compares the one that is there with what is asked for; returns it."""
    if len(source) == 0:
        raise ValueError(f"expected at least one row to encode; {_name_of(source)} has none.")
    image_processor, config = processor.image_processor, model.config
    size = {"height": config.image_size, "width": config.image_size}
    if image_processor.size != size:
        raise ValueError(
            f"expected a processor that makes pictures of the model's size, {size}; its `size` is "
            f"{image_processor.size}. Use the processor of the model's folder."
        )
    begun = _read_index(folder) if (folder / INDEX_NAME).exists() else None
    index = {
        "version": __version__,
        "command": command,
        "source": _name_of(source),
        "num_rows": len(source),
        "pictures_sha256": pictures_sha256(source),
        "vae_sha256": vae_sha256(model),
        "image_processor": _identity(image_processor),
        "latent_shape": [config.latent_channels, config.latent_size, config.latent_size],
        "num_copies": num_copies,
        "kinds": {"picture": 1 + num_copies},
        "seed": seed,
        "shard_size": shard_size,
    }
    if num_copies > 0:
        # To find out may take a look at all rows; of the same pictures it is known.
        is_known = begun is not None and all(begun[name] == index[name] for name in ("pictures_sha256", "num_copies"))
        if "content" in begun["kinds"] if is_known else _has_content(source):
            index["kinds"]["content"] = num_copies
    if begun is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")
        begun = _read_index(folder)  # another process may have been there too
    if changed := [name for name in IDENTITY if begun[name] != index[name]]:
        differences = "; ".join(f"its {IDENTITY[name]} is {begun[name]}, now it is {index[name]}" for name in changed)
        raise ValueError(
            f"expected the source, VAE and options with which {shorten(str(folder))} was begun; {differences}. Give "
            "the same ones to go on, name another folder, or remove this one."
        )
    return begun


def _identity(image_processor: MMARImageProcessor) -> dict[str, Any]:
    """Arguments of an image processor; of those that came later only what is not the default."""
    options = {key: getattr(image_processor, key) for key in DEFAULTS}
    later = ("rescale_factor", "image_mean", "image_std")
    return {key: value for key, value in options.items() if key not in later or value != DEFAULTS[key]}


def _has_content(source: Source) -> bool:
    """Whether an answer of a row hangs on what its picture shows, in whatever style."""
    for index in tqdm(range(len(source)), desc="kinds of answers", delay=2):
        try:
            if "content" in (source[index].get("depends_on") or ()):
                return True
        except BadRow:
            continue  # it is reported when it is encoded
    return False


def _is_done(folder: Path, index: dict[str, Any], shard: int) -> bool:
    path = _shard_path(folder, index, shard)
    if not path.exists():
        return False
    try:
        _open_shard(folder, index, shard)
    except ValueError:
        print(f"{path} is broken; it is written again.", file=sys.stderr)
        return False
    return True


def _encode(
    model: MMARForConditionalGeneration,
    rows: list[int],
    pixel_values: Tensor | None,
    broken: dict[int, dict[str, Any]],
    index: dict[str, Any],
) -> Tensor:
    """Mean and std of a batch, `(B, V, 2, C, h, w)` in half precision; adds to `broken` what the VAE breaks on."""
    num_views = sum(index["kinds"].values())
    latents = torch.zeros(len(rows), num_views, 2, *index["latent_shape"], dtype=torch.half)
    if pixel_values is not None:
        distribution = model.encode_image_distributions(pixel_values.to(model.vae.device))
        # (G * V, 2, C, h, w), G good rows; half precision is far finer than the posterior's std.
        encoded = torch.stack([part.cpu().half() for part in distribution], dim=1)
        latents[[row not in broken for row in rows]] = encoded.unflatten(0, (-1, num_views))
    is_finite = torch.isfinite(latents).flatten(1).all(1)
    for place in (~is_finite).nonzero().flatten().tolist():
        latents[place] = 0
        reason = "the VAE makes latents of it that are NaN or beyond half precision."
        broken[rows[place]] = _broken(rows[place], {}, reason)
    return latents


def _shard_bytes(latents: Tensor, rows: range, broken: dict[int, dict[str, Any]], index: dict[str, Any]) -> bytes:
    """A shard's file, from the latents `(R, V, 2, C, h, w)` of its rows."""
    parts = latents.split(list(index["kinds"].values()), dim=1)
    tensors = {kind: part.contiguous() for kind, part in zip(index["kinds"], parts, strict=True)}
    tensors["broken"] = torch.tensor([row in broken for row in rows])
    shard = rows[0] // index["shard_size"]
    about = {"cache": _identity_sha256(index), "shard": shard, "broken": [broken[row] for row in sorted(broken)]}
    return save(tensors, metadata={METADATA_KEY: json.dumps(about)})


def _finish(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]] | None:
    """If all shards are there, gathers their broken rows in broken.json, and returns them."""
    shards = range(_num_shards(index))
    if not all(_shard_path(folder, index, shard).exists() for shard in shards):
        return None
    broken = [row for shard in shards for row in _open_shard(folder, index, shard).broken]
    write_whole(folder / BROKEN_NAME, json.dumps(broken, indent=2).encode() + b"\n")
    if len(broken) == index["num_rows"]:
        raise ValueError(
            f"expected pictures in {shorten(index['source'])}; all {len(broken)} rows are broken, the first of them: "
            f"{broken[0]['reason']} Look at the source and its columns, remove {shorten(str(folder))} and encode it "
            "again."
        )
    return broken


# ------------------------------------------------------------------------------------------------------------- reading


class LatentCache:
    r"""
    Latents that `cache_latents` wrote: only the rows that are looked at are read.

    It is pickled as the folder's name, so that the workers of a `DataLoader` open the files themselves.

    Args:
        folder (`str` or `Path`): As `cache_latents` wrote it.

    Attributes:
        index (`dict`): What index.json says.

    Raises:
        ValueError: If the folder is missing, unfinished, or a shard of it is truncated, another cache's or another
            shard's.

    Example:

    ```python
    >>> cache = LatentCache("runs/latents")
    >>> mean, std = cache[0]["picture"][0].float()
    ```
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = _read_index(folder)
        shards = range(_num_shards(index))
        # One by one: a broken index may ask for more than a list can hold.
        missing = next((shard for shard in shards if not _shard_path(folder, index, shard).exists()), None)
        if missing is not None:
            num_there = sum(1 for _ in folder.glob(f"latents-*-of-{len(shards):05d}.safetensors"))
            raise ValueError(
                f"expected {len(shards)} shards of latents in {shorten(str(folder))}; {len(shards) - num_there} are "
                f"missing, the first of them {_shard_path(folder, index, missing).name}. {_how_to_finish(index)}"
            )
        opened = (_open_shard(folder, index, shard) for shard in shards)
        states = [(shard.size, shard.modified) for shard in opened]
        self.__setstate__({"folder": folder, "index": index, "states": states})

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index, "states": self._states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.index, self._states = state["folder"], state["index"], state["states"]

        def open_shard(shard: int) -> _Shard:
            # As it was at the start, whoever opens it.
            size, modified = self._states[shard]
            return replace(_open_shard(self.folder, self.index, shard), size=size, modified=modified)

        self._shard = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(open_shard)

    def __len__(self) -> int:
        return self.index["num_rows"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        r"""
        Args:
            index (`int`): Of the source's row.

        Returns:
            `dict[str, torch.HalfTensor]`: Mean and std of shape `(copies, 2, C, h, w)` for `"picture"`, the first of
            which is the picture itself, and, if answers hang on it, `"content"`.

        Raises:
            BadRow: If the row's picture is broken.
            ValueError: If its shard has changed since the cache was opened.
            IndexError: If there is no such row.
        """
        row = range(len(self))[index]
        shard, place = divmod(row, self.index["shard_size"])
        opened = self._shard(shard)
        if opened.is_broken[place]:
            reason = next((entry["reason"] for entry in opened.broken if entry["row"] == row), "no reason is known.")
            raise BadRow(f"row {row} of {shorten(self.index['source'])} has no latents: {reason}")
        return opened.read(place)

    @property
    def has_views(self) -> bool:
        """Whether there are changed pictures beside the pictures themselves."""
        return self.index["num_copies"] > 0

    def check(self, model: MMARForConditionalGeneration, source: Source) -> None:
        r"""
        Args:
            model (`MMARForConditionalGeneration`): To be trained on these latents.
            source (`Source`): Whose pictures they should be.

        Raises:
            ValueError: If they were made with another VAE or latent scale, or of other pictures.
        """
        if (sha256 := vae_sha256(model)) != self.index["vae_sha256"]:
            raise ValueError(
                f"expected latents of the model's VAE and latent scale in {shorten(str(self.folder))}; they were made "
                f"with another one (its fingerprint is {self.index['vae_sha256']}, the model's {sha256}). Train the "
                "model that they were made with, or encode the pictures again, into another folder."
            )
        shape = [model.config.latent_channels, model.config.latent_size, model.config.latent_size]
        if shape != self.index["latent_shape"]:
            raise ValueError(
                f"expected latents of shape {shape}, the model's, in {shorten(str(self.folder))}; they are of shape "
                f"{self.index['latent_shape']}. Encode the pictures again, into another folder."
            )
        if len(source) != len(self) or pictures_sha256(source) != self.index["pictures_sha256"]:
            raise ValueError(
                f"expected latents of the {len(source)} rows of {shorten(_name_of(source))} in "
                f"{shorten(str(self.folder))}; they are of the {len(self)} rows that {shorten(self.index['source'])} "
                "had when they were made. Encode the pictures again, into another folder."
            )


# ------------------------------------------------------------------------------------------------------------- command


def _columns(arguments: Sequence[str]) -> dict[str, str]:
    columns = {}
    for argument in arguments:
        key, _, name = argument.partition("=")
        if not key or not name:
            raise ValueError(f"--columns takes key=name, such as image=jpg; got {shorten(argument)}.")
        columns[key] = name
    return columns


def main(
    data: str,
    model_name: str,
    out: Path,
    num_copies: int,
    shard_size: int,
    batch_size: int,
    seed: int,
    columns: Sequence[str],
    split: str,
    image_folder: str | None,
    num_workers: int,
    num_processes: int | None,
    process_index: int | None,
) -> None:
    r"""
    Encodes the images of a source, or goes on with it, and prints what came of it.

    Args:
        data (`str`): As for `open_source`, like `split` and `image_folder`.
        model_name (`str`): Folder or repository of an MMAR.
        out (`Path`): As `folder` for `cache_latents`, like the numbers below.
        num_copies, shard_size, batch_size, seed, num_workers (`int`, *optional*): As for `cache_latents`.
        columns (`Sequence[str]`, *optional*): `key=name`, the data's names of our columns.
        split (`str`): Of a data set.
        image_folder (`str`, *optional*): Where relative paths of images start, and what all must lie in.
        num_processes, process_index (`int`, *optional*): How many encode into the folder, and which of them this is;
            as torchrun says by default.

    Raises:
        ValueError: If a column is not `key=name`, or as `open_source`, `open_model` and `cache_latents` raise.
    """
    if num_processes is None:
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if process_index is None:
        process_index = int(os.environ.get("RANK", 0))
    source = open_source(data, _columns(columns), split, image_folder)
    model = open_model(model_name, "--model")
    processor = open_processor(model_name, "--model")
    # Only the VAE is used from here on; a backbone has gigabytes.
    for name in [name for name, _ in model.named_children() if name != "vae"]:
        delattr(model, name)
    if torch.accelerator.is_available():
        device = int(os.environ.get("LOCAL_RANK", process_index)) % torch.accelerator.device_count()
        model.vae.to(torch.device(torch.accelerator.current_accelerator().type, device))
    command = command_of(
        "cache-latents",
        data,
        model=model_name,
        out=out,
        split=split,
        num_copies=num_copies,
        shard_size=shard_size,
        batch_size=batch_size,
        seed=seed,
        image_folder=image_folder,
        columns=columns,
    )
    broken = cache_latents(
        source,
        model,
        processor,
        out,
        num_copies,
        shard_size,
        batch_size,
        seed,
        num_workers,
        num_processes,
        process_index,
        command=command,
    )
    if broken is None:
        print(
            f"the shards of process {process_index} of {num_processes} are written; some of others are still missing."
        )
        return
    print(f"{out}: latents of {len(source)} rows, {len(broken)} of them broken.")
    for entry in broken[:MAX_REASONS_SHOWN]:
        print(f"broken: row {entry['row']}, id {entry['id']}: {entry['reason']}")
    if len(broken) > MAX_REASONS_SHOWN:
        print(f"and {len(broken) - MAX_REASONS_SHOWN} more, in {out / BROKEN_NAME}")

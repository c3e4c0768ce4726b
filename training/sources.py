"""Training rows (rows.py) by their number, or as a stream, from the layouts in which data sets come."""

import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from tqdm.auto import tqdm

from ..files import write_whole
from ..modeling_mmar.configuration_mmar import shorten, shorten_names
from .rows import (
    MAX_SAMPLE_BYTES,
    PICTURE_EXTENSIONS,
    TEXT_EXTENSIONS,
    UNREADABLE,
    BadRow,
    as_bad_row,
    check_columns,
    make_row,
    unused_columns,
    wanted_columns,
)


logger = logging.getLogger(__name__)

# A source is refused at once if none of its first rows can be used, and says which of their parts no row takes.
NUM_PROBED_ROWS = 100
# Samples of a folder of pictures and texts that are one shard of its stream.
FOLDER_SHARD_SIZE = 1000
# Folders within such a folder that belong to other splits.
SPLIT_FOLDERS = ("train", "test", "val", "valid", "validation", "dev", "eval")
# Rows of a parquet file that a stream holds at a time.
STREAM_BATCH_SIZE = 32
# Under HF_HOME; the number is that of the index's layout.
TAR_INDEX_FOLDER = ("mmar", "tar_index_2")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
# A byte order mark may stand before JSON.
JSON_SPACE = re.compile(r"[\s\ufeff]*")
# What an element's end depends on.
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class Source(Protocol):
    """Training rows by number. Reading one raises `BadRow` if it is broken, `IndexError` if there is no such number,
    and `ValueError` if the source itself can no longer be read."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(
    path: str | Path,
    columns: Mapping[str, str | None] | None = None,
    split: str = "train",
    image_folder: str | Path | None = None,
) -> Source:
    r"""
    Opens training rows for access by number.

    Args:
        path (`str` or `Path`): One of

            * `*.parquet`, `*.tar` (WebDataset, not compressed; an index of it is kept under HF_HOME), `*.json` or
              `*.jsonl` (LLaVA's `conversations`, or `messages`): a file, a glob or a range of files such as
              `shard-{000..012}.tar`
            * a folder that `datasets.save_to_disk` wrote
            * a folder of pictures with a text of the same name each, such as `001.jpg` and `001.txt` or `001.json`
            * a folder of pictures, with metadata.csv or metadata.jsonl for captions, a folder of parquet files, an id
              on the Hub, or whatever else `datasets.load_dataset` reads
        columns (`Mapping[str, str]`, *optional*): The file's columns by our keys, such as `{"image": "photo"}`, where
            `COLUMN_NAMES` does not have them; in a tar shard extensions or keys of the JSON member. A key of None is
            not read.
        split (`str`, *optional*, defaults to `"train"`): Of what `datasets` reads; files are read as they are.
        image_folder (`str` or `Path`, *optional*): Where relative paths of pictures start, and what all their files
            must lie in; the folder of their file by default.

    Returns:
        `Source` of training rows, with one picture as `image` and several as `images`. What it has that no row takes,
        members of a tar, columns or files of a folder, is logged as a warning.

    Raises:
        ValueError: If there is no such source, it is not what its name says or has no rows, a column is missing, or
            none of its first rows can be used.

    Example:

    ```python
    >>> rows = open_source("checkpoints/emoji-lite/train.parquet")
    >>> rows[0]["captions"]
    ```
    """
    path, columns = os.fspath(path), check_columns(columns)
    kind = _kind(path)
    if kind == "parquet":
        files = _expand(path)
        _check_parquet(files, columns, path)
        # `datasets` copies the rows once into its cache (HF_DATASETS_CACHE), as Arrow, and maps it into memory: a row
        # costs its own bytes wherever it stands, and workers share them. In parquet itself a row costs the decoding
        # of its row group, up to hundreds of pictures; sets too large to copy are streamed, or come as tar shards.
        data_files = {"train": [glob.escape(os.path.abspath(file)) for file in files]}
        rows = _load("parquet", path, "train", data_files=data_files)
        source = TableSource(rows, path, columns, image_folder or Path(files[0]).parent)
    elif kind == "tar":
        spans, members = {}, Counter()
        for file in tqdm(_expand(path), desc="indices of tar shards", delay=2):
            spans[file], own_members = _tar_spans(file)
            members.update(own_members)
        source = FileSource(spans, _tar_record, path, columns, image_folder)
        _warn_of_unused(path, "members", _unused_members(members, columns))
    elif kind == "json":
        spans = {file: _json_spans(file) for file in _expand(path)}
        source = FileSource(spans, _json_record, path, columns, image_folder)
    elif kind == "folder" and (found := _find_captioned(path, split)) is not None:
        source = FolderSource(found, path, columns, image_folder or path)
    else:
        rows = _load_saved(path, split) if kind == "saved" else _load(path, path, split)
        folder = image_folder or (None if kind == "hub" else path)
        source = TableSource(rows, path, columns, folder)
        if kind == "folder":
            _warn_of_unused(path, "files", _unused_files(path, split, rows))
    return _probed(source)


def open_stream(
    path: str | Path,
    columns: Mapping[str, str | None] | None = None,
    split: str = "train",
    image_folder: str | Path | None = None,
) -> datasets.IterableDataset:
    r"""
    Opens training rows to be read one after the other; nothing is copied or indexed.

    A row that cannot be read comes as `{"unreadable": reason}`, at which `check_row` raises; what cannot be read any
    more, such as a shard that vanished, ends the stream with a `ValueError`.

    A file is a shard. `datasets.distributed.split_dataset_by_node` and the workers of a `DataLoader` give each row to
    one of them, whatever their number; shards in a multiple of ranks times workers spare them from reading, though
    not from opening, the pictures of others.

    Args:
        path (`str` or `Path`): `*.parquet` or `*.tar` files, a folder or an id on the Hub, as for `open_source`.
        columns, split, image_folder: As for `open_source`.

    Returns:
        `datasets.IterableDataset` of training rows.

    Raises:
        ValueError: If there is no such source, it cannot be streamed, is not what its name says or has no rows, a
            column is missing, or none of its first rows can be used.
    """
    path, columns = os.fspath(path), check_columns(columns)
    kind = _kind(path)
    if kind in ("json", "saved"):
        raise ValueError(
            f"expected parquet files, tar shards, a folder or an id on the Hub to stream; got {shorten(path)}. Its "
            "texts fit in memory or are mapped: open it by number."
        )
    if kind == "folder" and (found := _find_captioned(path, split)) is not None:
        shards = [found[start : start + FOLDER_SHARD_SIZE] for start in range(0, len(found), FOLDER_SHARD_SIZE)]
        kwargs = {"shards": shards, "name": path, "columns": columns, "folder": image_folder or path}
        return _probed_stream(datasets.IterableDataset.from_generator(_stream_folder, gen_kwargs=kwargs), path)
    if kind in ("hub", "folder"):
        rows = _load(path, path, split, streaming=True)
        if kind == "folder":
            _warn_of_unused(path, "files", _unused_files(path, split, rows))
        folder = image_folder or (path if kind == "folder" else None)
        return _probed_stream(_stream_dataset(rows, path, columns, folder), path)
    files = _expand(path)
    if kind == "parquet":
        _check_parquet(files, columns, path)
        names = dict.fromkeys(itertools.chain.from_iterable(pq.read_schema(file).names for file in files))
        _warn_of_unused_columns(path, list(names), columns)
    else:
        members: Counter[str] = Counter()
        num_samples = 0
        for file in files:
            # As far as the first samples: a shard that is streamed is read once.
            own_samples = itertools.islice(itertools.pairwise(_tar_bounds(file, members)), NUM_PROBED_ROWS)
            if (num_samples := num_samples + len(list(own_samples))) >= NUM_PROBED_ROWS:
                break
        if num_samples == 0:
            raise _no_rows(path)
        first = f"members of the first {num_samples} samples"
        _warn_of_unused(path, first, _unused_members(members, columns))
    stream = datasets.IterableDataset.from_generator(
        _stream_parquet if kind == "parquet" else _stream_tar,
        # `datasets` takes a list for shards.
        gen_kwargs={"files": files, "columns": columns, "image_folder": image_folder},
    )
    return _probed_stream(stream, path)


# Sources


@dataclass
class TableSource:
    """Rows of a `datasets.Dataset`; relative paths of pictures start at `folder`."""

    rows: datasets.Dataset
    name: str
    columns: dict[str, str | None]
    folder: str | Path | None

    def __post_init__(self):
        if len(self.rows) == 0:
            raise _no_rows(self.name)
        # As Arrow, pictures stay the bytes or paths that they are, and other columns are not read.
        wanted = wanted_columns(self.rows.column_names, self.columns, self.name)
        _warn_of_unused_columns(self.name, self.rows.column_names, self.columns)
        self.rows = self.rows.select_columns(wanted).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _check_index(index, self)
        return _table_row(self.rows[index], self.columns, self.folder, f"row {index} of {self.name}")


@dataclass(frozen=True)
class IndexedFile:
    """A file as it was when it was indexed."""

    path: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: str) -> "IndexedFile":
        """Raises ValueError if there is none."""
        try:
            state = os.stat(path)
        except OSError as error:
            raise _vanished(path, error) from error
        return cls(path, state.st_size, state.st_mtime_ns)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `[start, end)`; raises BadRow if they are too many, ValueError if the file is not what it was."""
        if end - start > MAX_SAMPLE_BYTES:
            raise BadRow(
                f"bytes {start} to {end} of {self.path} must be at most {MAX_SAMPLE_BYTES}, a row's; got "
                f"{end - start}. Pack them as several rows."
            )
        try:
            # Opened each time: there may be more shards than a process may have open.
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise _vanished(self.path, error) from error
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(
                f"expected {shorten(self.path)} as it was when it was indexed; it has changed since. Start again."
            )
        return data


def _vanished(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"expected {path!r}, which was there at the start; it cannot be read any more ({error}). Put it back and "
        "start again."
    )


class FileSource:
    r"""
    Rows that are spans of files, read by seeking.

    Args:
        spans (`dict[str, tuple[np.ndarray, np.ndarray]]`): For each file, where its rows begin and end, in bytes.
        read_record (`Callable`): From the bytes of a span, the file's path and the row's number in it to the columns
            and the row's name.
        name (`str`): Of the source.
        columns (`dict[str, str]`): Columns by our keys.
        folder (`str` or `Path`, *optional*): Where relative paths of pictures start; the file's folder by default.
    """

    def __init__(
        self,
        spans: dict[str, tuple[np.ndarray, np.ndarray]],
        read_record: Callable[[bytes, str, int], tuple[dict[str, Any], str]],
        name: str,
        columns: dict[str, str | None],
        folder: str | Path | None,
    ):
        self.files = [IndexedFile.of(path) for path in spans]
        self.spans = list(spans.values())
        self.read_record, self.name, self.columns, self.folder = read_record, name, columns, folder
        self._ends = list(itertools.accumulate(len(starts) for starts, _ in self.spans))
        if len(self) == 0:
            raise _no_rows(name)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, name, path = self.record(index)
        return make_row(record, self.columns, self.folder or Path(path).parent, name)

    def record(self, index: int) -> tuple[dict[str, Any], str, str]:
        """Columns of a row, its name and its file."""
        _check_index(index, self)
        number = bisect_right(self._ends, index)
        file, (starts, ends) = self.files[number], self.spans[number]
        place = index - self._ends[number] + len(starts)
        data = file.read(int(starts[place]), int(ends[place]))
        with as_bad_row(f"row {place} of {file.path}"):
            record, name = self.read_record(data, file.path, place)
        return record, name, file.path


class FolderSource:
    r"""
    Rows of a folder of pictures that have texts of the same name.

    Args:
        samples (`list[list[str]]`): For each row its picture and its texts, paths within `name`.
        name (`str`): The folder.
        columns (`dict[str, str]`): Columns by our keys.
        folder (`str` or `Path`): What all files must lie in.
    """

    def __init__(self, samples: list[list[str]], name: str, columns: dict[str, str | None], folder: str | Path):
        self.samples, self.name, self.columns, self.folder = samples, name, columns, folder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, name = self.record(index)[:2]
        return make_row(record, self.columns, self.folder, name)

    def record(self, index: int) -> tuple[dict[str, Any], str, str]:
        """Columns of a row, its name and the folder."""
        _check_index(index, self)
        return *_folder_record(self.samples[index], self.name), self.name


def _check_index(index: int, source: Source) -> None:
    if not 0 <= index < len(source):
        raise IndexError(f"expected a row in [0, {len(source)}) of {source.name}; got {index}.")


def _probed(source: Source) -> Source:
    """The source, if one of its first rows can be used; warns of what they have that no row takes."""
    num_probed = min(len(source), NUM_PROBED_ROWS)
    if isinstance(source, (FileSource, FolderSource)):
        keys: Counter[str] = Counter()
        for index in range(num_probed):
            with suppress(BadRow):
                record = source.record(index)[0]
                inner = record.get("json")
                keys.update(map(str, {**inner, **record} if isinstance(inner, dict) else record))
        # Other members of a tar are counted over all samples.
        known = [key for key in keys if key.rpartition(".")[2] not in (*PICTURE_EXTENSIONS, *TEXT_EXTENSIONS)]
        _warn_of_unused_columns(source.name, known, source.columns, keys, f" of the first {num_probed} rows")
    reasons = []
    for index in range(num_probed):
        try:
            source[index]
            return source
        except BadRow as error:
            reasons.append(error)
    raise _no_usable(source.name, len(reasons), reasons[0]) from reasons[0]


def _probed_stream(stream: datasets.IterableDataset, name: str) -> datasets.IterableDataset:
    """The stream, if one of its first rows can be used."""
    reasons = []
    for row in itertools.islice(stream, NUM_PROBED_ROWS):
        if UNREADABLE not in row:
            return stream
        reasons.append(row[UNREADABLE])
    raise _no_usable(name, len(reasons), reasons[0]) if reasons else _no_rows(name)


def _no_usable(name: str, num_probed: int, reason: Any) -> ValueError:
    return ValueError(
        f"expected training rows in {name}; none of the first {num_probed} can be used, the first because {reason}"
    )


# What no row takes


def _warn_of_unused(name: str, what: str, counts: Mapping[str, int]) -> None:
    if counts:
        parts = [
            f"{part} ({count})" for part, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        ]
        logger.warning(
            "%s has %s that no row takes: %s. Name them with `columns`, or drop them.",
            shorten(name),
            what,
            shorten_names(parts),
        )


def _warn_of_unused_columns(
    name: str,
    existing: Sequence[str],
    columns: dict[str, str | None],
    counts: Mapping[str, int] | None = None,
    of: str = "",
) -> None:
    unused, second = unused_columns(existing, columns)
    parts = [column if counts is None else f"{column} ({counts[column]})" for column in unused]
    parts += [f"{column} (only where {first} is empty)" for column, first in second.items()]
    if parts:
        logger.warning(
            "%s has %d columns%s that no row takes: %s. Name them with `columns`, or drop them.",
            shorten(name),
            len(parts),
            of,
            shorten_names(parts),
        )


def _unused_members(members: Mapping[str, int], columns: dict[str, str | None]) -> dict[str, int]:
    """Members of tar shards by extension, without those that rows are made of."""
    has_own_pictures = columns.get("image") is not None or columns.get("images") is not None

    def is_used(extension: str) -> bool:
        if extension.rpartition(".")[2] in PICTURE_EXTENSIONS and not has_own_pictures:
            return True
        unused, _ = unused_columns([extension], columns)
        return not unused

    return {extension: count for extension, count in members.items() if not is_used(extension)}


def _unused_files(folder: str, split: str, rows: Any) -> Counter[str]:
    """Files of a folder, by extension, that are in no split or are not what `datasets` read the folder as."""
    kind = rows.info.builder_name
    readers = datasets.packaged_modules._EXTENSION_TO_MODULE
    metadata = datasets.packaged_modules._MODULE_TO_METADATA_FILE_NAMES.get(kind, ())
    splits = datasets.load_dataset_builder(folder).config.data_files or {}
    own = {os.path.abspath(file) for file in splits.get(split, ())}
    others = {os.path.abspath(file) for files in splits.values() for file in files} - own
    pictures: set[str] = set()
    if kind == "imagefolder" and isinstance(rows, datasets.Dataset) and "image" in rows.column_names:
        # With metadata it reads those pictures only that are named there.
        paths = (entry["path"] for entry in rows.with_format("arrow")[:]["image"].to_pylist() if entry is not None)
        pictures = {os.path.abspath(path) for path in paths if path}
    unused: Counter[str] = Counter()
    for path in map(os.path.abspath, _files_of(folder)):
        extension = os.path.splitext(re.sub(r"\.(gz|bz2|xz|zst|lz4)$", "", path))[1].lower()
        is_read = path in own and (
            os.path.basename(path) in metadata
            or extension == ".zip"
            or readers.get(extension, ("",))[0] == kind
            and (not pictures or path in pictures)
        )
        if path not in others and not is_read:
            unused[extension or os.path.basename(path)] += 1
    return unused


def _files_of(folder: str) -> Iterator[str]:
    """Paths of all files of a folder, but hidden ones, in order."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(root, name) for name in sorted(files) if not name.startswith("."))


# Folders of pictures and texts


def _find_captioned(path: str, split: str) -> list[list[str]] | None:
    """
    For each picture of a folder its path and those of its texts, such as 001.jpg, 001.txt and 001.json, within the
    folder; None if no picture has one, or a file of metadata describes them. Warns of files that are in no row.
    """
    start = os.path.join(path, split)
    if not os.path.isdir(start):
        start = path
    files = [os.path.relpath(file, path) for file in _files_of(start)]
    others = [name for name in SPLIT_FOLDERS if name != split]
    files = [file for file in files if start != path or file.split(os.sep)[0] not in others]
    stems: dict[str, list[str]] = {}
    pictures, texts = [], []
    for file in files:
        stem, extension = os.path.splitext(file)
        if os.path.basename(stem).lower() == "metadata":
            return None
        if extension[1:].lower() in PICTURE_EXTENSIONS:
            pictures.append(file)
        elif extension[1:].lower() in (*TEXT_EXTENSIONS, "json"):
            stems.setdefault(stem, []).append(file)
    for picture in pictures:
        # 001.txt, or 001.jpg.txt.
        texts.append(stems.get(os.path.splitext(picture)[0], []) + stems.get(picture, []))
    if not any(texts):
        return None
    used = {*pictures, *itertools.chain.from_iterable(texts)}
    unused = Counter(os.path.splitext(file)[1].lower() or os.path.basename(file) for file in files if file not in used)
    _warn_of_unused(path, "files", unused)
    return [[picture, *own] for picture, own in zip(pictures, texts, strict=True)]


def _folder_record(files: list[str], folder: str) -> tuple[dict[str, Any], str]:
    picture, *texts = files
    name = f"{picture} of {folder}"
    members: dict[str, Any] = {os.path.splitext(picture)[1][1:].lower(): picture}
    for text in texts:
        extension = os.path.splitext(text)[1][1:].lower()
        if extension in members:
            raise BadRow(f"{name} must have one text {shorten(extension)}; got several. Keep one.")
        with as_bad_row(name), open(os.path.join(folder, text), "rb") as file:
            members[extension] = file.read(MAX_SAMPLE_BYTES)
    return _sample_record(os.path.splitext(picture)[0], members, name), name


def _stream_folder(
    shards: list[list[list[str]]], name: str, columns: dict[str, str | None], folder: str | Path
) -> Iterator[dict[str, Any]]:
    def read(files: list[str]) -> dict[str, Any]:
        record, own_name = _folder_record(files, name)
        return make_row(record, columns, folder, own_name)

    for files in itertools.chain.from_iterable(shards):
        yield _row_or_reason(read, files)


# Tar shards


def _tar_bounds(path: str, members: Counter[str] | None = None) -> Generator[int, None, Counter[str]]:
    """
    Where each sample of a tar shard begins, in bytes, and last where they end. As in WebDataset the members of a
    sample stand together and share their name up to the first dot. Returns the number of members by
    extension; a caller that does not read to the end gives the counter.
    """
    last_key = None
    members = Counter() if members is None else members
    try:
        # Not compressed: there is no seeking in what is.
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or tarfile keeps all headers
                key, extension = _split_member(member.name)
                if not member.isdir():
                    extension = extension if key is not None else os.path.basename(member.name)
                    members[extension if member.isreg() else f"{extension}, a link or device"] += 1
                if member.isreg() and key is not None and key != last_key:
                    last_key = key
                    yield member.offset
            end = tar.offset
            # tarfile takes a broken header for the end, where zeros, or nothing at all, must stand.
            tar.fileobj.seek(end)
            rest = tar.fileobj.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, RecursionError) as error:
        raise ValueError(
            f"expected a tar shard, not compressed, at {shorten(path)}; it cannot be read ({shorten(error)}). "
            "Download or pack it again."
        ) from error
    if rest not in (b"", tarfile.NUL * tarfile.BLOCKSIZE):
        raise ValueError(
            f"expected a whole tar shard at {shorten(path)}; it is broken after byte {end}. Download or pack it again."
        )
    yield end
    return members


def _tar_spans(path: str) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, int]]:
    """
    Where the samples of a shard begin and end, and how many members it has by extension; kept from the first time, 8
    bytes a sample.
    """
    state = os.stat(path)
    # By its whole path: files of one name, size and time are not rare among shards.
    key = b"\0".join([os.fsencode(os.path.realpath(path)), b"%d" % state.st_size, b"%d" % state.st_mtime_ns])
    kept = Path(constants.HF_HOME, *TAR_INDEX_FOLDER, hashlib.blake2b(key, digest_size=16).hexdigest() + ".npy")
    try:
        with open(kept, "rb") as file:
            bounds, members = np.load(file), dict(json.load(file))
    # It is not there, or a full disk cut it.
    except (OSError, ValueError, TypeError, EOFError):
        members = {}

        def walk() -> Iterator[int]:
            members.update((yield from _tar_bounds(path)))

        bounds = np.fromiter(walk(), np.int64)
        with suppress(OSError):  # a cache that cannot be written is done without
            content = io.BytesIO()
            np.save(content, bounds)
            write_whole(kept, content.getvalue() + json.dumps(members).encode())
    # Views: a sample ends where the next one begins.
    return (bounds[:-1], bounds[1:]), members


def _split_member(name: str) -> tuple[str | None, str]:
    """Key and extension of a tar's member; no key for what belongs to no sample, such as hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else (None, "")


def _tar_record(data: bytes, path: str, place: int) -> tuple[dict[str, Any], str]:
    """Columns of a sample: its text and pictures by extension, and what its JSON holds."""
    members: dict[str, Any] = {}
    key, name, num_bytes = "", path, 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            own_key, extension = _split_member(member.name)
            if not member.isreg() or own_key is None:
                continue
            key, name = own_key, f"sample {own_key!r} of {path}"
            if extension in members:
                raise BadRow(f"{name} must have one member {shorten(extension)}; got several. Pack it again.")
            num_bytes += member.size
            if num_bytes > MAX_SAMPLE_BYTES:  # of a sparse member the shard holds less
                raise BadRow(f"{name} must hold at most {MAX_SAMPLE_BYTES} bytes; got {num_bytes}. Pack it again.")
            members[extension] = tar.extractfile(member).read()
    return _sample_record(key, members, name), name


def _sample_record(key: str, members: dict[str, Any], name: str) -> dict[str, Any]:
    """Columns of a sample, from its members by extension: contents, or of pictures their paths."""
    record: dict[str, Any] = {"__key__": key}
    pictures = []
    for extension, content in members.items():
        last = extension.rpartition(".")[2]
        if last in PICTURE_EXTENSIONS:
            record[extension] = content
            pictures.append(content)
        elif last in (*TEXT_EXTENSIONS, "json"):
            try:
                record[extension] = json.loads(content) if last == "json" else content.decode("utf-8").strip()
            except (ValueError, RecursionError) as error:
                raise BadRow(
                    f"{name} must have its {shorten(extension)} as UTF-8 {last}; it is not: {shorten(error)}."
                ) from error
    if not isinstance(record.get("json", {}), dict):
        raise BadRow(f"{name} must have a JSON object as 'json'; got {type(record['json']).__name__}.")
    if pictures:
        # In place of paths in the JSON.
        record["image"], record["images"] = (pictures[0], None) if len(pictures) == 1 else (None, pictures)
    return record


# JSON


def _json_spans(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the objects of a JSON list, or of one object a line, begin and end, in bytes."""
    try:
        if path.endswith(".jsonl"):
            spans = _line_spans(path)
        else:
            text = Path(path).read_bytes().decode("utf-8")
            start = JSON_SPACE.match(text).end()
            if text.startswith("[", start):
                spans = _list_spans(text, start)
            else:
                json.loads(text[start:].partition("\n")[0])
                spans = _line_spans(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a JSON list, or one JSON object a line, at {shorten(path)}; it cannot be read "
            f"({shorten(error)}). Repair it."
        ) from error
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    return starts, ends


def _line_spans(path: str) -> list[tuple[int, int]]:
    spans, end = [], 0
    with open(path, "rb") as file:
        for line in file:
            start, end = end, end + len(line)
            if line.strip():
                spans.append((start, end))
    return spans


def _list_spans(text: str, start: int) -> list[tuple[int, int]]:
    """Of the elements of a JSON list, one decoded at a time: all of LLaVA's mix would take gigabytes."""
    decoder, spans = json.JSONDecoder(), []
    position = JSON_SPACE.match(text, start + 1).end()
    while not text.startswith("]", position):
        if spans:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = JSON_SPACE.match(text, position + 1).end()
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError):  # too deep, or a number of too many digits: one bad row
            end = _element_end(text, position)
        spans.append((position, end))
        position = JSON_SPACE.match(text, end).end()
    if JSON_SPACE.match(text, position + 1).end() != len(text):
        raise json.JSONDecodeError("Extra data", text, position + 1)
    if text.isascii():
        return spans
    # Characters to bytes.
    in_bytes, place, last = [], 0, 0
    for start, end in spans:
        start_byte = place + len(text[last:start].encode())
        place, last = start_byte + len(text[start:end].encode()), end
        in_bytes.append((start_byte, place))
    return in_bytes


def _element_end(text: str, position: int) -> int:
    """Where an object or list ends that cannot be decoded."""
    depth = 0
    for token in JSON_TOKEN.finditer(text, position):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.group(), 0)
        if depth <= 0:
            return token.end()
    raise json.JSONDecodeError("Unterminated element", text, position)


def _json_record(data: bytes, path: str, place: int) -> tuple[dict[str, Any], str]:
    name = f"row {place} of {path}"
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} must be a JSON object; it is broken: {shorten(error)}.") from error
    if not isinstance(record, dict):
        raise BadRow(f"{name} must be a JSON object; got {type(record).__name__}.")
    return record, name


# Streams


def _stream_parquet(
    files: list[str], columns: dict[str, str | None], image_folder: str | Path | None
) -> Iterator[dict[str, Any]]:
    for path in files:
        folder = image_folder or Path(path).parent
        try:
            with pq.ParquetFile(path) as file:
                wanted = wanted_columns(file.schema_arrow.names, columns, path)
                batches = file.iter_batches(STREAM_BATCH_SIZE, columns=wanted)
                records = (batch.slice(place, 1) for batch in batches for place in range(batch.num_rows))
                for index, record in enumerate(records):
                    yield _row_or_reason(_table_row, record, columns, folder, f"row {index} of {path}")
        except (pa.ArrowException, OSError) as error:
            raise _vanished(path, error) from error


def _table_row(
    record: pa.RecordBatch | pa.Table, columns: dict[str, str | None], folder: str | Path | None, name: str
) -> dict[str, Any]:
    with as_bad_row(name):  # such as text that is not UTF-8
        values = record.to_pylist()[0]
    return make_row(values, columns, folder, name)


def _stream_tar(
    files: list[str], columns: dict[str, str | None], image_folder: str | Path | None
) -> Iterator[dict[str, Any]]:
    def read(file: IndexedFile, start: int, end: int) -> dict[str, Any]:
        data = file.read(start, end)
        with as_bad_row(f"bytes {start} to {end} of {file.path}"):
            record, name = _tar_record(data, file.path, 0)
        return make_row(record, columns, image_folder or Path(file.path).parent, name)

    for path in files:
        # The headers are walked as the samples are read, by another handle.
        file = IndexedFile.of(path)
        for start, end in itertools.pairwise(_tar_bounds(path)):
            yield _row_or_reason(read, file, start, end)


def _stream_dataset(
    rows: datasets.IterableDataset, path: str, columns: dict[str, str | None], folder: str | Path | None
) -> datasets.IterableDataset:
    rows = rows.decode(False)
    names = rows.column_names or list(next(iter(rows), ()))
    if not names:
        raise _no_rows(path)
    wanted = wanted_columns(names, columns, path)
    _warn_of_unused_columns(path, names, columns)

    def read(record: dict[str, Any]) -> dict[str, Any]:
        return _row_or_reason(make_row, record, columns, folder, f"a row of {path}")

    return rows.select_columns(wanted).map(read, remove_columns=wanted)


def _row_or_reason(read: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return read(*args)
    except BadRow as error:
        return {UNREADABLE: str(error)}


# Paths


def _kind(path: str) -> str:
    """Which layout a path has: parquet, tar, json, saved, folder or hub."""
    if os.path.isdir(path):
        is_saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
        return "saved" if is_saved else "folder"
    kinds = {".parquet": "parquet", ".tar": "tar", ".json": "json", ".jsonl": "json"}
    kind = kinds.get(Path(path).suffix, "hub")
    if kind == "hub" and os.path.exists(path):
        raise ValueError(f"expected a folder, or a file of {', '.join(kinds)}; got {shorten(path)}. Convert it.")
    return kind


def _expand(path: str) -> list[str]:
    """Files of a path, a glob, or a range `{000..012}`; raises ValueError if one is missing."""
    files = []
    for pattern in _expand_braces(path):
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"expected a file at {shorten(pattern)}; there is none. Check the path.")
        if strange := [file for file in found if not os.path.isfile(file)]:
            raise ValueError(
                f"expected files at {shorten(pattern)}; {shorten(strange[0])} is none. Narrow the pattern."
            )
        files += found
    return files


def _expand_braces(path: str) -> Iterator[str]:
    """One by one: of a range of a million names the first that is missing is refused, and no list is made of them."""
    found = BRACES.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"expected a rising range in {shorten(path)}; got {found.group()}. Turn it round.")
    for number in range(int(first), int(last) + 1):
        yield from _expand_braces(f"{path[: found.start()]}{number:0{len(first)}d}{path[found.end() :]}")


def _check_parquet(files: Sequence[str], columns: dict[str, str | None], name: str) -> None:
    """Reads what the files say of themselves; raises ValueError if one is no parquet or lacks columns, or no rows."""
    num_rows = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                names, num_rows = file.schema_arrow.names, num_rows + file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"expected a parquet file at {shorten(path)}; it cannot be read ({shorten(error)}). Download or write "
                "it again."
            ) from error
        wanted_columns(names, columns, path)
    if num_rows == 0:
        raise _no_rows(name)


def _load(builder: str, path: str, split: str, **kwargs: Any) -> Any:
    try:
        return datasets.load_dataset(builder, split=split, **kwargs)
    # Builders raise whatever their readers and the network do.
    except Exception as error:
        raise ValueError(
            f"expected a data set that `datasets.load_dataset` reads, with the split {shorten(split)}, at "
            f"{shorten(path)}; it cannot be read ({error.__cause__ or error}). Check path, split, network and "
            "HF_DATASETS_CACHE."
        ) from error


def _load_saved(path: str, split: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:
        raise ValueError(
            f"expected a data set that `datasets.save_to_disk` wrote at {shorten(path)}; it cannot be read "
            f"({shorten(error)}). Save it again."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"expected the split {shorten(split)} in {shorten(path)}; got {', '.join(loaded)}. Pass one of them."
        )
    return loaded[split]


def _no_rows(name: str) -> ValueError:
    return ValueError(f"expected at least one row in {name}; got none. Drop the source.")

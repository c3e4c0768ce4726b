"""Rows come as they stand in every layout, broken ones are named, and streams give each row to one reader."""

import base64
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.distributed import split_dataset_by_node
from PIL import Image
from squares import make_rows
from torch.utils.data import DataLoader

from mmar.processors.image_processing_mmar import MMARImageProcessor
from mmar.training import sources
from mmar.training.rows import BadRow, check_row, open_pictures, pictures_of
from mmar.training.sources import open_source, open_stream


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Caches of this test alone."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(folder))
    return folder


def picture_bytes(colour="red", mode="RGB", size=(8, 8), kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, rows, **kwargs):
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} if "image" in row else row for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)
    return path


def write_tar(path, members, mode="w", **kwargs):
    with tarfile.open(path, mode, **kwargs) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def numbered_tar(path, numbers):
    members = [(f"{n:04d}.{end}", content) for n in numbers for end, content in (("png", b"p"), ("txt", b"a cat"))]
    return write_tar(path, members)


def write_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def save_picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(colour))
    return str(path)


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
ANSWER = {"from": "gpt", "value": "A cat."}


# Parquet and `datasets`


def test_rows_of_parquet_are_those_written(tmp_path):
    rows = make_rows()
    source = open_source(write_parquet(tmp_path / "a.parquet", rows))
    assert [source[i] for i in range(len(source))] == rows
    assert source.name == str(tmp_path / "a.parquet")
    assert pickle.loads(pickle.dumps(source))[3] == rows[3]  # for workers that are spawned
    with pytest.raises(IndexError, match="a.parquet"):
        source[4]
    with pytest.raises(IndexError):
        source[-1]


def test_several_parquet_files_are_one_source(tmp_path):
    rows = make_rows()
    folder = tmp_path / "a[0]"  # brackets are a glob's
    folder.mkdir()
    for number in range(4):
        write_parquet(folder / f"part-{number:02d}.parquet", rows[number : number + 1])
    pattern = str(tmp_path / "a*" / "part-*.parquet")
    shutil.copytree(folder, tmp_path / "b")  # in the name of a folder, `datasets` takes them for one
    for path in (pattern, folder / "part-{00..03}.parquet", tmp_path / "b"):
        source = open_source(path)
        assert [source[i] for i in range(len(source))] == rows
    assert len(open_source(folder / "part-{01..02}.parquet")) == 2
    assert open_source(folder / "part-00.parquet")[0] == rows[0]


def test_changed_files_are_read_anew(tmp_path):
    rows = make_rows()
    write_parquet(tmp_path / "a.parquet", rows[:2])
    assert len(open_source(tmp_path / "a.parquet")) == 2
    write_parquet(tmp_path / "a.parquet", rows)
    assert len(open_source(tmp_path / "a.parquet")) == 4


def test_columns_of_other_names(tmp_path):
    rows = [{"photo": picture_bytes(), "words": "a cat", "text": "a question", "key": 7, "lot": [1, 2]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = {"image": "photo", "captions": "words", "id": "key"}
    expected = {"image": rows[0]["photo"], "captions": ["a cat"], "id": 7}
    assert open_source(tmp_path / "a.parquet", columns)[0] == expected
    assert next(iter(open_stream(tmp_path / "a.parquet", columns))) == expected
    # Known names need no mapping, and None keeps one out.
    assert open_source(tmp_path / "a.parquet", {"image": "photo"})[0]["captions"] == ["a question"]
    assert "captions" not in open_source(tmp_path / "a.parquet", {"image": "photo", "captions": None})[0]
    for open_rows in (open_source, open_stream):
        with pytest.raises(ValueError, match="`columns`"):
            open_rows(tmp_path / "a.parquet", {"image": "foto"})
        with pytest.raises(ValueError, match="a.parquet"):
            open_rows(tmp_path / "a.parquet")
        for wrong in ({"picture": "photo"}, {"image": 5}):
            with pytest.raises(ValueError, match="`columns`"):
                open_rows(tmp_path / "a.parquet", wrong)


def test_pictures_are_not_opened_by_sources(tmp_path, monkeypatch):
    rows = [{**make_rows()[0], "image": b"no picture"}]
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened"))
    write_parquet(tmp_path / "a.parquet", rows)
    saved = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet")).cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert open_source(path)[0] == rows[0]
    (tmp_path / "folder").mkdir()
    saved.to_parquet(tmp_path / "folder" / "train.parquet")  # with the feature `Image` in its schema
    assert open_source(tmp_path / "folder")[0] == rows[0]
    for path in (tmp_path / "a.parquet", tmp_path / "folder", tmp_path / "folder" / "train.parquet"):
        assert next(iter(open_stream(path))) == rows[0]


def test_saved_data_sets_and_their_splits(tmp_path):
    rows = make_rows()
    write_parquet(tmp_path / "a.parquet", rows)
    data = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"))
    splits = {"train": data.select([2, 0]), "test": data.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert [source[0], source[1]] == [rows[2], rows[0]]
    assert open_source(tmp_path / "saved", split="test")[0] == rows[1]
    with pytest.raises(ValueError, match="'val'"):
        open_source(tmp_path / "saved", split="val")
    with pytest.raises(ValueError, match="stream"):
        open_stream(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="`datasets.save_to_disk`"):
        open_source(tmp_path / "saved")


def test_splits_of_a_folder(tmp_path):
    rows = make_rows()
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows[:3])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows[3:])
    assert len(open_source(tmp_path)) == 3
    assert open_source(tmp_path, split="test")[0] == rows[3]
    assert list(open_stream(tmp_path, split="test")) == rows[3:]
    for open_rows in (open_source, open_stream):
        with pytest.raises(ValueError, match="'val'"):
            open_rows(tmp_path, split="val")


def test_folders_of_pictures(tmp_path):
    for colour in ("red", "blue"):
        save_picture(tmp_path / "a" / f"{colour}.png", colour)
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\nred.png,a red square\nblue.png,a blue square\n")
    rows = [
        {"image": str(tmp_path / "a" / f"{colour}.png"), "captions": [f"a {colour} square"]}
        for colour in ("blue", "red")
    ]
    source = open_source(tmp_path / "a")
    assert sorted((source[0], source[1]), key=str) == rows
    assert open_pictures(source[0])[0].size == (8, 8)
    assert sorted(open_stream(tmp_path / "a"), key=str) == rows
    # Alone they are rows for unconditional pictures.
    save_picture(tmp_path / "b" / "red.png")
    assert open_source(tmp_path / "b")[0] == {"image": str(tmp_path / "b" / "red.png")}


def test_pictures_within_archives(tmp_path):
    save_picture(tmp_path / "a" / "red.png")
    (tmp_path / "zipped").mkdir()
    shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", tmp_path / "a")
    assert open_source(tmp_path / "zipped")[0] == {"image": picture_bytes("red")}
    (tmp_path / "zipped" / "train.zip").unlink()
    row = {"image": {"bytes": None, "path": f"zip://red.png::{tmp_path}/zipped/train.zip"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="red.png"):
        open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("captions", ["a", " "], "row 1 of .*a.parquet must have `captions`, none of them empty; got \\['a', ' '\\]"),
        ("captions", [""], "row 1 of .*a.parquet must have `captions`, none of them empty"),
        ("answers", ["red", None], "row 1 of .*a.parquet must have `answers`, none of them empty"),
        ("answers", ["red"], "one answer per question; got 2 questions and 1 answers"),
        ("answers", None, "one answer per question; got 2 questions and 0 answers"),
        ("image", b"", "row 1 of .* must hold its picture's file.*; got none"),
        ("depends_on", ["picture", "mood"], "`depends_on` with, for each answer, one of picture, content, style"),
        ("depends_on", ["picture"], "`depends_on` with, for each answer, one of picture, content, style; got"),
        (
            "swaps",
            ["yellow", None],
            "`swaps` with, for each answer, a text that stands in it once, before a space, or null; got",
        ),
        ("swaps", ["e", None], "stands in it once"),
        ("swaps", [None, "square"], "stands in it once, before a space"),
        ("swaps", ["", None], "stands in it once"),
    ],
)
def test_bad_rows_of_parquet(tmp_path, column, value, message):
    rows = [{column: None, **row} for row in make_rows()]
    rows[1][column] = value
    path = write_parquet(tmp_path / "a.parquet", rows)
    source = open_source(path)
    with pytest.raises(BadRow, match=message):
        source[1]
    good = make_rows()
    assert [source[0], source[2], source[3]] == [good[0], good[2], good[3]]
    # Neither does one end a stream.
    streamed = list(open_stream(path))
    assert [streamed[0], streamed[2], streamed[3]] == [good[0], good[2], good[3]]
    assert streamed[1].keys() == {"unreadable"}
    with pytest.raises(BadRow, match=message):
        check_row(streamed[1], "")


def test_what_may_be_missing(tmp_path):
    row = {"image": picture_bytes()}
    write_parquet(tmp_path / "a.parquet", [{**row, "captions": [], "questions": None, "answers": []}])
    assert open_source(tmp_path / "a.parquet")[0] == {**row, "captions": [], "answers": []}
    for good in (
        row,
        {"latents": {}},
        {**row, "captions": None},
        {"images": [row["image"]] * 2, "questions": ["Same?"], "answers": ["yes"]},
    ):
        assert check_row(good, "row 0") is good


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"captions": ["a"]}, "row 7 must hold a picture as `image`, .* got captions"),
        ({"image": "nowhere/a.png"}, "got 'nowhere/a.png', where no file is"),
        ({"images": [b"a", None]}, "got none"),
        ({"image": b"a", "captions": "a cat"}, "row 7 must have `captions` as a list of strings; got 'a cat'"),
        ({"image": b"a", "captions": [5]}, "`captions` as a list of strings"),
        ({"image": b"a", "questions": ["?"], "answers": ["a b"], "swaps": [5]}, "stands in it once"),
        ({"messages": "hello"}, "`messages` as a list of turns"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turns of user, assistant or system .* 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "turn 0 is of 'user' with \\['video'\\]"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "turn 0 is of 'user' with \\['str'\\]"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0 is of 'user' with \\['NoneType'\\]"),
    ],
)
def test_rows_of_ones_own_are_checked(row, message):
    with pytest.raises(BadRow, match=message):
        check_row(row, "row 7")


def test_unusable_parquet(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    write_parquet(tmp_path / "cut.parquet", make_rows())
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    empty = pa.table({"image": pa.array([], pa.binary()), "captions": pa.array([], pa.list_(pa.string()))})
    pq.write_table(empty, tmp_path / "empty.parquet")
    write_parquet(tmp_path / "bad.parquet", [{**make_rows()[0], "image": b""}])
    for open_rows in (open_source, open_stream):
        for name, message in (
            ("none.parquet", "none.parquet"),
            ("part-{0..3}.parquet", "part-0.parquet"),
            ("part-{3..0}.parquet", "{3..0}"),
            ("*.none.parquet", ".none.parquet"),
            ("text.parquet", "text.parquet"),
            ("cut.parquet", "cut.parquet"),
            ("empty.parquet", "empty.parquet"),
        ):
            with pytest.raises(ValueError, match=message):
                open_rows(tmp_path / name)
        (tmp_path / "text.txt").write_text("a")
        with pytest.raises(ValueError, match=".parquet"):
            open_rows(tmp_path / "text.txt")
        with pytest.raises(ValueError, match="`datasets.load_dataset`"):
            open_rows(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="bad.parquet"):
        open_source(tmp_path / "bad.parquet")


# Tar shards


def test_samples_of_tar_shards(tmp_path):
    red, blue = picture_bytes("red"), picture_bytes("blue", kind="JPEG")
    chat = {"id": "c", "image": "x/y.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ANSWER]}
    long = "n" * 150  # more than a header holds
    members = [
        (".hidden", b"?"),
        ("README", b"?"),
        ("00/a.b.txt", b"no picture"),
        ("00/0001.png", red),
        ("00/0001.txt", "a café\n".encode()),
        ("00/0001.json", b'{"caption": "other", "url": "u"}'),
        ("00/0002.JPG", blue),
        ("00/0002.json", b'{"caption": "a blue square", "key": "0002", "width": 8, "error_message": null}'),
        ("01/0002.png", red),  # another folder, another sample
        ("chat.json", json.dumps(chat).encode()),
        ("chat.jpg", blue),
        (f"{long}.png", red),
        (f"{long}.npy", b"1234"),
        ("two.0.png", red),
        ("two.1.png", blue),
        ("two.json", b'{"question": "Same?", "answer": "no"}'),
    ]
    messages = [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    expected = [
        {"id": "00/0001", "image": red, "captions": ["a café"]},
        {"id": "00/0002", "image": blue, "captions": ["a blue square"]},
        {"id": "01/0002", "image": red},
        {"id": "c", "image": blue, "messages": messages},
        {"id": long, "image": red},
        {"id": "two", "images": [red, blue], "questions": ["Same?"], "answers": ["no"]},
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / f"{form}.tar", members, format=form)
        source = open_source(path)
        with pytest.raises(BadRow, match="'00/a'"):
            source[0]
        assert [source[i] for i in range(1, len(source))] == expected
        streamed = list(open_stream(path))
        assert streamed[1:] == expected
        assert streamed[0].keys() == {"unreadable"}
    columns = {"image": "1.png", "captions": "question", "id": None}
    assert open_source(path, columns)[6] == {
        "image": blue,
        "captions": ["Same?"],
        "questions": ["Same?"],
        "answers": ["no"],
    }
    with pytest.raises(BadRow, match="`image`"):
        open_source(path, columns)[1]
    # All first rows lack a misspelt one.
    with pytest.raises(ValueError, match="7"):
        open_source(path, {"captions": "foo"})
    assert pickle.loads(pickle.dumps(source))[1] == expected[0]


def test_bad_samples_of_tar_shards(tmp_path):
    good = [("z.png", b"p")]
    for members, message in (
        ([("a.png", b"p"), ("a.json", b"{")], "'a'.*json"),
        ([("a.png", b"p"), ("a.json", b"[]")], "'a'.*list"),
        ([("a.png", b"p"), ("a.txt", b"\xff")], "'a'.*txt"),
        ([("a.png", b"p"), ("a.txt", b" \n")], "`captions`"),
        ([("a.png", b"p"), ("a.json", b'{"caption": ""}')], "`captions`"),
        ([("a.png", b"p"), ("a.png", b"q")], "'a'.*png"),
        ([("a.png", b"")], "'a'.*none"),
    ):
        path = write_tar(tmp_path / "a.tar", members + good)
        source = open_source(path)
        with pytest.raises(BadRow, match=message):
            source[0]
        assert source[1] == {"image": b"p", "id": "z"}
        streamed = list(open_stream(path))
        assert streamed[1] == source[1]
        with pytest.raises(BadRow, match=message):
            check_row(streamed[0], "")


def test_several_shards_are_one_source(tmp_path):
    for shard, numbers in enumerate([range(0, 3), range(0), range(3, 8)]):
        numbered_tar(tmp_path / f"shard-{shard:03d}.tar", numbers)
    for pattern in ("shard-{000..002}.tar", "shard-*.tar"):
        source = open_source(tmp_path / pattern)
        assert [source[i]["id"] for i in range(len(source))] == [f"{n:04d}" for n in range(8)]
        assert [row["id"] for row in open_stream(tmp_path / pattern)] == [f"{n:04d}" for n in range(8)]
    for open_rows in (open_source, open_stream):
        with pytest.raises(ValueError, match="shard-003.tar"):
            open_rows(tmp_path / "shard-{000..003}.tar")
        with pytest.raises(ValueError, match="shard-001.tar"):
            open_rows(tmp_path / "shard-001.tar")


def test_the_index_is_kept(tmp_path, caches, monkeypatch):
    path = numbered_tar(tmp_path / "a.tar", range(5))
    rows = [open_source(path)[i] for i in range(5)]
    (kept,) = caches.glob("mmar/*/*")
    # A sample's picture and text: two headers and two blocks.
    assert np.load(kept).tolist() == [n * 4 * 512 for n in range(6)]
    walked = []
    walk = sources._tar_bounds
    monkeypatch.setattr(sources, "_tar_bounds", lambda path: walked.append(path) or walk(path))
    assert [open_source(path)[i] for i in range(5)] == rows
    assert walked == []
    # Of another size or time: made anew.
    numbered_tar(path, range(4))
    assert len(open_source(path)) == 4
    assert walked == [str(path)]
    # Cut, as by a full disk.
    for file in caches.glob("mmar/*/*"):
        file.write_bytes(file.read_bytes()[:-8])
    assert [open_source(path)[i] for i in range(4)] == rows[:4]
    assert walked == [str(path)] * 2
    assert len(open_source(path)) == 4
    assert walked == [str(path)] * 2
    assert not list(caches.rglob("*.unfinished"))


def test_the_index_needs_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    path = numbered_tar(tmp_path / "a.tar", range(3))
    assert open_source(path)[2]["id"] == "0002"


def test_unusable_shards(tmp_path):
    whole = numbered_tar(tmp_path / "whole.tar", range(4)).read_bytes()
    end = 4 * 4 * 512
    broken = bytearray(whole)
    broken[2048 + 148 : 2048 + 156] = b"9" * 8  # the checksum of the second sample's header
    write_tar(tmp_path / "packed.tar", [("a.png", b"p")], "w:gz")
    for name, content, message in (
        ("text", b"no tar", "text.tar"),
        ("empty", b"", "tar"),
        ("packed", (tmp_path / "packed.tar").read_bytes(), "tar"),
        ("in_data", whole[: end - 600], "in_data.tar"),
        ("in_header", whole[: end - 2000], "in_header.tar"),
        ("broken", bytes(broken), "broken.tar"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / f"{name}.tar")
        with pytest.raises(ValueError, match=message):
            list(open_stream(tmp_path / f"{name}.tar"))
    # Without the zeros that close it, a tar is whole.
    (tmp_path / "whole.tar").write_bytes(whole[:end])
    assert len(open_source(tmp_path / "whole.tar")) == 4


def test_shards_that_vanish_or_change(tmp_path):
    for shard in range(2):
        numbered_tar(tmp_path / f"{shard}.tar", range(3))
        write_parquet(tmp_path / f"{shard}.parquet", make_rows())
    source = open_source(tmp_path / "{0..1}.tar")
    streams = [open_stream(tmp_path / "{0..1}.tar"), open_stream(tmp_path / "{0..1}.parquet")]
    indexed = (tmp_path / "0.tar").stat()
    numbered_tar(tmp_path / "0.tar", range(4))
    # Of the same size, since tars are filled up; and later, whatever the clock of the disk tells apart.
    assert (tmp_path / "0.tar").stat().st_size == indexed.st_size
    os.utime(tmp_path / "0.tar", ns=(indexed.st_atime_ns, indexed.st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match="0.tar") as info:
        source[0]
    assert not isinstance(info.value, BadRow)
    for kind, stream, num_rows in zip(("tar", "parquet"), streams, (4, 4), strict=True):
        (tmp_path / f"1.{kind}").unlink()
        rows = iter(stream)
        for _ in range(num_rows):
            next(rows)
        with pytest.raises(ValueError, match=f"1.{kind}") as info:
            next(rows)
        assert not isinstance(info.value, BadRow)
    with pytest.raises(ValueError, match="1.tar"):
        source[3]


# LLaVA and other chats


def test_llava_conversations(tmp_path):
    paths = [save_picture(tmp_path / "train" / f"{n}.png") for n in range(3)]
    rows = [
        {
            "id": "one",
            "image": "train/0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is “it”?"},
                ANSWER,
                {"from": "human", "value": "  Sure?\n"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "id": 2,
            "image": ["train/0.png", "train/1.png", paths[2]],
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "In <image> and <image>, what\ndiffers?\n<image>"},
                ANSWER,
            ],
        },
        {"id": "text", "conversations": [{"from": "human", "value": "Hi 🐈"}, ANSWER]},
        {"image": "train/1.png", "conversations": [{"from": "human", "value": "<image>"}, ANSWER]},
    ]
    answer = {"role": "assistant", "content": [text("A cat.")]}
    expected = [
        {
            "id": "one",
            "image": paths[0],
            "messages": [
                {"role": "user", "content": [IMAGE, text("What is “it”?")]},
                answer,
                {"role": "user", "content": [text("  Sure?\n")]},
                {"role": "assistant", "content": [text("Yes.")]},
            ],
        },
        {
            "id": 2,
            "images": paths,
            "messages": [
                {"role": "system", "content": [text("Be short.")]},
                {
                    "role": "user",
                    "content": [text("In"), IMAGE, text("and"), IMAGE, text(", what\ndiffers?"), IMAGE],
                },
                answer,
            ],
        },
        {"id": "text", "messages": [{"role": "user", "content": [text("Hi 🐈")]}, answer]},
        {"image": paths[1], "messages": [{"role": "user", "content": [IMAGE]}, answer]},
    ]
    source = open_source(write_json(tmp_path / "a.json", rows))
    assert [source[i] for i in range(len(source))] == expected
    assert [len(open_pictures(source[i])) for i in range(4)] == [1, 3, 0, 1]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    (tmp_path / "ascii.json").write_text("\ufeff \n" + json.dumps(rows) + "\n", encoding="utf-8")
    # Pictures elsewhere.
    (tmp_path / "elsewhere").mkdir()
    write_json(tmp_path / "elsewhere" / "a.json", rows)
    for path in ("a.jsonl", "lines.json", "ascii.json", "elsewhere/a.json"):
        source = open_source(tmp_path / path, image_folder=tmp_path if "/" in path else None)
        assert [source[i] for i in range(len(source))] == expected
    assert len(open_source(tmp_path / "*s*.json")) == 8
    # The text alone is usable there.
    source = open_source(tmp_path / "elsewhere" / "a.json")
    with pytest.raises(BadRow, match="a.json"):
        source[0]
    with pytest.raises(ValueError, match="a.json"):
        open_stream(tmp_path / "a.json")


def test_messages_with_images(tmp_path):
    paths = [save_picture(tmp_path / f"{n}.png") for n in range(2)]
    uri = "data:image/png;base64," + base64.b64encode(picture_bytes("blue")).decode()
    answer = {"role": "assistant", "content": "A cat."}
    rows = [
        {"messages": [{"role": "user", "content": "What?<image>"}, answer], "images": ["0.png"]},
        {
            "messages": [
                {"role": "user", "content": [IMAGE, {"type": "text", "text": "And <image>?"}]},
                {"role": "assistant", "content": [text("A cat.")]},
            ],
            "images": ["1.png"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": uri}},
                        {"type": "image", "image": "1.png"},
                        text("Same?"),
                    ],
                },
                answer,
            ]
        },
    ]
    last = {"role": "assistant", "content": [text("A cat.")]}
    expected = [
        {"messages": [{"role": "user", "content": [text("What?"), IMAGE]}, last], "image": paths[0]},
        {"messages": [{"role": "user", "content": [IMAGE, text("And <image>?")]}, last], "image": paths[1]},
        {
            "messages": [{"role": "user", "content": [IMAGE, IMAGE, text("Same?")]}, last],
            "images": [picture_bytes("blue"), paths[1]],
        },
    ]
    source = open_source(write_json(tmp_path / "a.json", rows))
    assert [source[i] for i in range(3)] == expected
    # The same from a table, where what a turn lacks is null.
    folded = [{**row, "images": [{"path": path, "bytes": None} for path in row["images"]]} for row in rows[:1]]
    pq.write_table(pa.Table.from_pylist(folded), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet")[0] == expected[0]
    with pytest.raises(BadRow, match="1 .*2"):
        check_row({**expected[0], "image": None, "images": paths}, "row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, "row 1 of .* must hold a picture as `image`, .*, or a chat"),
        ({"conversations": "hello"}, "row 1 of .* must have its chat as a list of turns; got 'hello'"),
        ({"conversations": [ANSWER], "image": "0.png"}, "must have one mark <image> per picture; got 0 marks for 1"),
        ({"conversations": [{"from": "human", "value": "<image> a"}, ANSWER]}, "got 1 marks for 0 pictures"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "must have a turn of the assistant, .*; got none"),
        ({"conversations": [{"from": "bing", "value": "a"}, ANSWER]}, "turns from human, .*; got one from 'bing'"),
        ({"conversations": [{"from": "gpt", "value": " "}]}, "no empty turn; turn 0, of the assistant, is"),
        ({"conversations": [{"from": "human"}, ANSWER]}, "no empty turn; turn 0, of the user, is"),
        (
            {"conversations": [{"from": "gpt", "value": "<image>"}], "image": "0.png"},
            "its pictures in turns of the user; turn 0, the assistant's, has one",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "got a part {'type': 'video'}"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "must have turns of text and pictures; got \\['a'\\]"),
        ({"messages": [{"role": "user", "content": 5}]}, "must have turns of text and pictures; got 5"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "turns from human, .*; got one from \\['user'\\]"),
        ({"messages": [{"role": "user", "content": [text(None)]}]}, "got a part {'type': 'text', 'text': None}"),
        ({"image": {"path": 5}}, "must hold its picture's file, .*; got int"),
        ({"image": "data:image/png;base64,é"}, "must hold its picture in base64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "0.png"}]}], "images": ["0.png"]},
            "must have its pictures in its chat, or beside it; got both",
        ),
        ({"image": "0.png", "images": ["0.png"]}, "`image` or `images`; got both"),
        ({"images": "0.png"}, "`images` as a list; got str"),
        ({"image": "1.png"}, "must hold its picture's file, .*1.png', where no file is"),
        ({"image": "https://localhost/0.png"}, "must hold its picture's file, .*0.png', where no file is"),
        ({"image": "data:image/png;base64,?"}, "must hold its picture in base64"),
        ({"image": "data:,"}, "must hold its picture's file, .*; got none"),
        ({"text": "a"}, "must hold a picture .*; got captions"),
        ({}, "must hold a picture .*; got nothing"),
        ([], "row 1 of .* must be a JSON object; got list"),
    ],
)
def test_bad_chats(tmp_path, row, message):
    save_picture(tmp_path / "0.png")
    source = open_source(write_json(tmp_path / "a.json", [{"image": "0.png"}, row]))
    with pytest.raises(BadRow, match=message):
        source[1]


def test_broken_json(tmp_path):
    save_picture(tmp_path / "0.png")
    (tmp_path / "a.jsonl").write_text('{"image": "0.png"}\n{"image": \n{"image": "0.png", "text": "a"}\n')
    source = open_source(tmp_path / "a.jsonl")
    with pytest.raises(BadRow, match="a.jsonl"):
        source[1]
    assert source[2] == {"image": str(tmp_path / "0.png"), "captions": ["a"]}
    row = '{"image": "0.png"}'
    for content in (
        f"[{row}",
        f"[{row} {{}}]",
        f"[{row},]",
        '[{"image": "0.png",}]',
        f"[{row}] {{}}",
        f"{{\n{row}",
        "",
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match="a.json"):
            open_source(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="utf-8"):
        open_source(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(" [ ] ")
    with pytest.raises(ValueError, match="a.json"):
        open_source(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"file": "0.png"}]')
    with pytest.raises(ValueError, match="a.json"):
        open_source(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"image": "0.png"}\n')
    with pytest.raises(ValueError, match="a.jsonl"):
        source[0]


# Streams


def row_id(row):
    return row["id"]


def read_ids(stream, num_workers):
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=row_id)
    return list(loader)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there may be cores
@pytest.mark.parametrize(
    ("kind", "num_shards"), [("tar", 1), ("tar", 4), ("tar", 9), ("parquet", 4), ("folder", 4), ("folder", 1)]
)
def test_streams_give_each_row_to_one_reader(tmp_path, kind, num_shards):
    # Up to 9 readers, of which some have no row of a short shard.
    numbers = iter(range(1000))
    ids = []
    for shard in range(num_shards):
        own = [next(numbers) for _ in range(2 + 5 * (shard % 3))]
        ids += own
        if kind == "tar":
            numbered_tar(tmp_path / f"{shard}.tar", own)
        else:
            rows = [{"id": f"{n:04d}", "image": b"p"} for n in own]
            write_parquet(tmp_path / f"{shard}.parquet", rows, row_group_size=3)
    stream = open_stream(tmp_path if kind == "folder" else tmp_path / f"*.{kind}")
    assert stream.num_shards == num_shards
    shuffled = stream.shuffle(seed=3, buffer_size=4)
    # Who deals them out is the same for all; the builder of `datasets` for folders sleeps at the end of each worker.
    readers = itertools.product((1, 2, 3), (0, 1, 2, 3)) if kind == "tar" else [(3, 2), (2, 0)]
    for world_size, num_workers in readers:
        # As a training reads, in one of two passes.
        rows = shuffled if num_workers % 2 else stream
        rows.set_epoch(world_size - 1)
        ranks = [split_dataset_by_node(rows, rank, world_size) for rank in range(world_size)]
        seen = Counter(row for rank in ranks for row in read_ids(rank, num_workers))
        assert seen == Counter(f"{n:04d}" for n in ids), (world_size, num_workers)


def test_streams_start_at_once(tmp_path, caches):
    """Nothing is copied or indexed, and only what is asked for is read."""
    write_parquet(tmp_path / "0.parquet", make_rows())
    numbered_tar(tmp_path / "0.tar", range(3))
    for kind in ("parquet", "tar"):
        (tmp_path / f"1.{kind}").symlink_to(tmp_path / f"0.{kind}")
        stream = open_stream(tmp_path / f"*.{kind}")
        (tmp_path / f"1.{kind}").unlink()
        assert len(list(stream.take(2))) == 2
    assert not list(caches.rglob("*.arrow")) and not list(caches.rglob("*.npy"))


def test_streams_go_on_from_a_state(tmp_path):
    for shard in range(3):
        numbered_tar(tmp_path / f"{shard}.tar", range(10 * shard, 10 * shard + 4))
    stream = open_stream(tmp_path / "*.tar")
    rows = iter(stream)
    first = [next(rows)["id"] for _ in range(5)]
    state = stream.state_dict()
    again = open_stream(tmp_path / "*.tar")
    again.load_state_dict(state)
    rest = [row["id"] for row in again]
    assert first + rest == [row["id"] for row in open_stream(tmp_path / "*.tar")]


# Pictures


def test_pictures_are_opened_as_the_model_sees_them(tmp_path):
    processor = MMARImageProcessor(do_resize=False, do_center_crop=False)
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(noise[..., :3]).save(turned, "PNG", exif=exif)
    pictures = [turned.getvalue()]
    for picture in (
        Image.fromarray(noise[..., :3]),
        Image.fromarray(noise),
        Image.fromarray(noise[..., 0]),
        Image.fromarray(noise[..., 0]).convert("P"),
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        pictures += [picture, buffer.getvalue()]
    (tmp_path / "a.png").write_bytes(pictures[-1])
    pictures += [str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(io.BytesIO(turned.getvalue()))]
    opened = open_pictures({"images": pictures})
    assert opened[0].size == (6, 9) and opened[-1].size == (6, 9)
    for picture, own in zip(opened, pictures, strict=True):
        assert picture.mode == "RGB"
        assert np.array_equal(processor(picture)["pixel_values"], processor(own)["pixel_values"])
    assert open_pictures({"image": pictures[0]})[0].tobytes() == opened[0].tobytes()
    assert open_pictures({"latents": {}}) == [] == pictures_of({})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_pictures(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    for picture in (whole[: len(whole) // 2], b"no picture", tmp_path / "a.png"):
        with pytest.raises(BadRow, match="row 5 .*truncated"):
            open_pictures({"images": [whole, picture]}, "row 5")
    if kind != "WEBP":  # of which PIL reads all at once
        with pytest.raises(BadRow, match="truncated"):
            open_pictures({"image": Image.open(tmp_path / "a.png")})
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRow, match="a.png"):
        open_pictures({"image": str(tmp_path / "a.png")})


# Real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_data():
    for path, columns, num_rows, size in (
        ("emoji-styles", None, 10766, (64, 64)),
        ("grocery-store/iconic-*.parquet", None, 81, (96, 96)),
        (
            "vqa-mini/nlvr1-train-*.parquet",
            {"captions": None, "questions": "caption", "answers": "label"},
            989,
            (400, 100),
        ),
    ):
        source = open_source(SHARED / path, columns)
        assert len(source) == num_rows
        assert open_pictures(source[num_rows - 1])[0].size == size
        assert next(iter(open_stream(SHARED / path, columns))) == source[0]
    assert source[0]["answers"] in (["true"], ["false"])
    chats = open_source(SHARED / "components/llava/mllm_demo.json")
    assert [len(open_pictures(chats[i])) for i in range(len(chats))] == [2, 1, 1, 2, 1, 1]
    assert chats[3]["messages"][0] == {"role": "user", "content": [IMAGE, text("他们是谁？")]}
    with pytest.raises(ValueError, match="90"):
        open_source(SHARED / "components/llava/qa90_questions.jsonl")


@pytest.mark.parametrize(
    "pattern", ["a-{0..99999999}.tar", "a-{0..99999999}{0..99999999}.parquet", "{1..9999999999999}.jsonl"]
)
@pytest.mark.parametrize("open_rows", [open_source, open_stream])
def test_an_endless_range_is_refused_at_its_first_missing_file(tmp_path, pattern, open_rows):
    start = time.monotonic()
    with pytest.raises(ValueError, match="expected (a file at|parquet files)"):
        open_rows(tmp_path / pattern)
    assert time.monotonic() - start < 5

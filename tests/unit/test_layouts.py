"""Layouts that people have, what no row takes, which files rows may name, and rows that must not end a training."""

import base64
import io
import json
import logging
import os
import tarfile
import zipfile

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmar.processors.image_processing_mmar import MAX_IMAGE_BYTES
from mmar.training.rows import MAX_SAMPLE_BYTES, BadRow, check_row
from mmar.training.sources import open_source, open_stream


IMAGE = {"type": "image"}


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Caches of this test alone."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(folder))


def picture_bytes(colour="red", kind="PNG", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def save(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes() if content is None else content)
    return str(path)


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def text(words):
    return {"type": "text", "text": words}


def turn(role, *items):
    return {"role": role, "content": list(items)}


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# Layouts


def test_a_folder_of_pictures_and_texts(tmp_path, caplog):
    first, second = save(tmp_path / "001.jpg"), save(tmp_path / "more" / "a.b.PNG")
    third, fourth = save(tmp_path / "more" / "003.webp"), save(tmp_path / "more" / "alone.png")
    save(tmp_path / "001.txt", "a café\n".encode())
    save(tmp_path / "more" / "a.b.json", b'{"caption": "a boat", "url": "u"}')
    save(tmp_path / "more" / "003.webp.caption", b"a tree")
    save(tmp_path / "test" / "t.png")
    save(tmp_path / "test" / "t.txt", b"held out")
    save(tmp_path / "notes.txt", b"?")
    expected = [
        {"id": "001", "image": first, "captions": ["a café"]},
        {"id": "more/003", "image": third, "captions": ["a tree"]},
        {"id": "more/a.b", "image": second, "captions": ["a boat"]},
        {"id": "more/alone", "image": fourth},
    ]
    source = open_source(tmp_path)
    assert [source[i] for i in range(len(source))] == expected
    assert list(open_stream(tmp_path)) == expected
    held_out = open_source(tmp_path, split="test")
    assert [held_out[i]["captions"] for i in range(len(held_out))] == [["held out"]]
    assert any(".txt (1)" in message and str(tmp_path) in message for message in warnings_of(caplog))
    assert any("url (1)" in message for message in warnings_of(caplog))
    save(tmp_path / "001.txt", b"\xff")
    with pytest.raises(BadRow, match="001.jpg"):
        source[0]


def test_chats_without_marks_begin_with_their_pictures(tmp_path):
    paths = [save(tmp_path / f"{n}.png") for n in range(2)]
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    rows = [
        {"image": "0.png", "conversations": turns},
        {"image": ["0.png", "1.png"], "conversations": turns[1:]},
        {"images": ["1.png"], "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]},
    ]
    source = open_source(write_json(tmp_path / "a.json", rows))
    rest = [turn("assistant", text("A cat.")), turn("user", text("Sure?")), turn("assistant", text("Yes."))]
    assert source[0] == {
        "image": paths[0],
        "messages": [turn("system", text("Be short.")), turn("user", IMAGE, text("What?")), *rest],
    }
    assert source[1] == {"images": paths, "messages": [turn("user", IMAGE, IMAGE, text("What?")), *rest]}
    assert source[2]["messages"][0] == turn("user", IMAGE, text("Hi"))


def test_pairs_of_the_cauldron_and_finevision(tmp_path):
    pairs = [
        {"user": "What?", "assistant": "A cat.", "source": "vqa"},
        {"user": "Which colour?", "assistant": "Red.", "source": "vqa"},
    ]
    rows = [
        {"images": [{"bytes": picture_bytes(colour), "path": None} for colour in ("red", "blue")], "texts": pairs},
        {"images": [], "texts": pairs[:1]},
        {"images": [{"bytes": picture_bytes(), "path": None}], "texts": [{**pairs[0], "assistant": ""}]},
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    expected = [
        {
            "images": [picture_bytes("red"), picture_bytes("blue")],
            "messages": [
                turn("user", IMAGE, IMAGE, text("What?")),
                turn("assistant", text("A cat.")),
                turn("user", text("Which colour?")),
                turn("assistant", text("Red.")),
            ],
        },
        {"messages": [turn("user", text("What?")), turn("assistant", text("A cat."))]},
    ]
    source = open_source(tmp_path / "a.parquet")
    assert [source[0], source[1]] == expected
    with pytest.raises(BadRow, match="empty"):
        source[2]
    assert list(open_stream(tmp_path / "a.parquet"))[:2] == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_in_base64(tmp_path, kind):
    # Noise, so that both alphabets differ.
    picture = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(picture, kind)
    plain = base64.b64encode(picture.getvalue()).decode()
    spellings = [
        plain,
        plain.rstrip("="),
        base64.urlsafe_b64encode(picture.getvalue()).decode(),
        base64.encodebytes(picture.getvalue()).decode(),
        f"data:image/{kind.lower()};base64,{plain}",
        f"data:;base64,{plain.replace('+', '%2B').replace('=', '%3D')}",
    ]
    rows = [{"image": spelling, "text": "a"} for spelling in spellings]
    rows += [{"image": {"bytes": spelling, "path": None}, "text": "a"} for spelling in spellings[:1]]
    source = open_source(write_json(tmp_path / "a.json", rows))
    assert all(source[i]["image"] == picture.getvalue() for i in range(len(rows)))


@pytest.mark.parametrize("nothing", ["", None, [], [""], {"bytes": None, "path": None}, {"bytes": None, "path": ""}])
def test_text_only_rows_with_an_empty_picture(tmp_path, nothing):
    save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}]
    marked = [{"from": "human", "value": "<image>"}, turns[1]]
    rows = [
        {"image": nothing, "conversations": turns},
        {"image": nothing, "conversations": marked},
        {"image": nothing, "text": "a"},
    ]
    source = open_source(write_json(tmp_path / "a.json", rows))
    assert source[0] == {"messages": [turn("user", text("Hi")), turn("assistant", text("Hi."))]}
    with pytest.raises(BadRow, match="1 .*0"):
        source[1]
    with pytest.raises(BadRow, match="must hold"):
        source[2]


# What no row takes


def test_columns_that_no_row_takes_are_named(tmp_path, caplog):
    row = {"image": {"bytes": picture_bytes(), "path": None}, "caption": "a", "text": "b", "label": 1, "url": "u"}
    write_parquet(tmp_path / "a.parquet", [row])
    save(tmp_path / "folder" / "0.parquet", (tmp_path / "a.parquet").read_bytes())
    for open_rows in (open_source, open_stream):
        for path in (tmp_path / "a.parquet", tmp_path / "folder"):
            caplog.clear()
            open_rows(path)
            (message,) = warnings_of(caplog)
            assert str(path) in message and "label, url, text (only where caption is empty)" in message
    caplog.clear()
    write_parquet(tmp_path / "b.parquet", [{"image": row["image"], "photo": row["image"], "text": "a"}])
    open_source(tmp_path / "b.parquet", {"image": "photo", "captions": None})
    assert ": image." in warnings_of(caplog)[0]
    caplog.clear()
    open_source(tmp_path / "b.parquet", {"images": None, "image": "image"})
    assert "photo" in warnings_of(caplog)[0]
    caplog.clear()
    write_parquet(tmp_path / "c.parquet", [{"image": row["image"], "text": "a", "id": 3}])
    open_source(tmp_path / "c.parquet")
    assert warnings_of(caplog) == []


def test_keys_of_json_that_no_row_takes_are_named(tmp_path, caplog):
    save(tmp_path / "0.png")
    rows = [{"image": "0.png", "text": "a", "mood": "b"}, {"image": "0.png", "mood": 1, "width": 2}]
    open_source(write_json(tmp_path / "a.json", rows))
    (message,) = warnings_of(caplog)
    assert "2 columns of the first 2 rows" in message and "mood (2), width (1)" in message
    caplog.clear()
    chat = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
    open_source(
        write_json(tmp_path / "b.json", [{"image": "0.png", "messages": chat, "question": "?", "answer": "!"}])
    )
    (message,) = warnings_of(caplog)
    assert "question (only where messages is empty), answer (only where messages is empty)" in message


def test_members_of_tar_shards_that_no_row_takes_are_named(tmp_path, caplog):
    members = []
    for n in range(3):
        members += [(f"{n}.png", picture_bytes()), (f"{n}.txt", b"a"), (f"{n}.npy", b"1"), (f"{n}.0.txt", b"b")]
        members += [(f"{n}.json", b'{"url": "u", "caption": "c"}')]
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members)
    write_tar(tmp_path / "1.tar", [*members, ("README", b"?")])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        tar.addfile(link)
    expected = "members that no row takes: 0.txt (6), npy (6), README (1), jpg, a link or device (1)"
    for _ in range(2):  # also when the index is there
        caplog.clear()
        open_source(tmp_path / "*.tar")
        assert any(expected in message for message in warnings_of(caplog))
        assert any("url (6)" in message for message in warnings_of(caplog))
    caplog.clear()
    open_stream(tmp_path / "*.tar")
    assert any("6 samples that no row takes: 0.txt (6), npy (6)" in message for message in warnings_of(caplog))


def test_files_of_a_folder_that_no_row_takes_are_named(tmp_path, caplog):
    save(tmp_path / "pictures" / "a.png")
    save(tmp_path / "pictures" / "b.png")
    save(tmp_path / "pictures" / "c.PNG")
    save(tmp_path / "pictures" / "film.mp4", b"?")
    save(tmp_path / "pictures" / "metadata.csv", b"file_name,text,mood\na.png,red,good\n")
    for open_rows in (open_source, open_stream):
        caplog.clear()
        open_rows(tmp_path / "pictures")
        messages = " ".join(warnings_of(caplog))
        assert ".mp4 (1)" in messages and "mood" in messages
        # Pictures that the metadata does not name.
        assert (".png (2)" in messages) == (open_rows is open_source)
    write_parquet(tmp_path / "train.parquet", [{"image": {"bytes": picture_bytes(), "path": None}}])
    save(tmp_path / "tables" / "train.parquet", (tmp_path / "train.parquet").read_bytes())
    save(tmp_path / "tables" / "test.parquet", (tmp_path / "train.parquet").read_bytes())
    caplog.clear()
    open_source(tmp_path / "tables")
    assert warnings_of(caplog) == []


# Which files rows may name


def outside_rows(tmp_path):
    outside = save(tmp_path / "outside" / "secret.png")
    (tmp_path / "data").mkdir()
    os.symlink(outside, tmp_path / "data" / "link.png")
    os.symlink(tmp_path / "outside", tmp_path / "data" / "folder")
    inside = save(tmp_path / "data" / "own.png")
    return inside, [outside, "../outside/secret.png", "link.png", "folder/secret.png", "./x/../../outside/secret.png"]


def test_rows_reach_no_file_outside_their_folder(tmp_path):
    inside, paths = outside_rows(tmp_path)
    good = [{"image": inside}, {"image": "own.png"}, {"image": "x/../own.png"}]
    rows = good + [{"image": path} for path in paths] + [{"image": {"path": path}} for path in paths]
    chat = [{"role": "user", "content": [{"type": "image", "path": paths[0]}]}, {"role": "assistant", "content": "a"}]
    rows += [{"messages": chat}, {"images": [inside, paths[1]]}]
    source = open_source(write_json(tmp_path / "data" / "a.json", rows))
    assert [source[i]["image"] for i in range(2)] == [inside, inside]
    for index in range(3, len(rows)):
        with pytest.raises(BadRow, match="`image_folder`"):
            source[index]
    source = open_source(tmp_path / "data" / "a.json", image_folder=tmp_path)
    assert source[3]["image"] == paths[0]
    # A folder that is itself a link is where the caller named it.
    os.symlink(tmp_path / "data", tmp_path / "linked")
    assert open_source(tmp_path / "linked" / "a.json")[1] == {"image": str(tmp_path / "linked" / "own.png")}


def test_no_layout_reaches_a_file_outside(tmp_path):
    inside, paths = outside_rows(tmp_path)
    data = tmp_path / "data"
    rows = [{"image": {"bytes": None, "path": path}} for path in (inside, *paths)]
    write_parquet(data / "a.parquet", rows)
    members = [(f"{n}.json", json.dumps({"image": path}).encode()) for n, path in enumerate((inside, *paths))]
    write_tar(data / "a.tar", members)
    datasets.Dataset.from_list([{"image": path} for path in (inside, *paths)]).save_to_disk(data / "saved")
    for path in ("a.parquet", "a.tar"):
        source = open_source(data / path)
        assert source[0]["image"] == inside
        for index in range(1, 6):
            with pytest.raises(BadRow, match="`image_folder`"):
                source[index]
        streamed = list(open_stream(data / path))
        assert streamed[0]["image"] == inside
        assert all("`image_folder`" in row["unreadable"] for row in streamed[1:])
    with pytest.raises(ValueError, match="`image_folder`"):
        open_source(data / "saved")
    assert open_source(data / "saved", image_folder=tmp_path)[0]["image"] == inside
    # Of metadata, too.
    save(data / "pictures" / "a.png")
    save(data / "pictures" / "metadata.csv", b"file_name,text\na.png,a\n../../outside/secret.png,b\n")
    with pytest.raises(ValueError):
        source = open_source(data / "pictures")
        [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
    "url",
    [
        "file:///dev/zero",
        "file://{folder}/own.png",
        "http://127.0.0.1:9/a.png",
        "reference://a.png",
        "memory://a.png",
        "zip://a.png::http://127.0.0.1:9/a.zip",
        "zip://a.png::{outside}/a.zip",
        "zip://a.png::../outside/a.zip",
        "tar://a.png::{folder}/a.tar",
        "simplecache::file://{folder}/own.png",
        "zip://a.png::zip://b.zip::{folder}/a.zip",
        "/dev/zero",
        "hf://../x::file:///dev/zero",
        "local://{folder}/own.png",
        "dir://own.png::{folder}",
    ],
)
def test_rows_open_no_urls(tmp_path, url, monkeypatch):
    outside_rows(tmp_path)
    with zipfile.ZipFile(tmp_path / "outside" / "a.zip", "w") as archive:
        archive.writestr("a.png", picture_bytes())
    monkeypatch.setattr(fsspec, "open", lambda *args, **kwargs: pytest.fail("opened"))
    url = url.format(folder=tmp_path / "data", outside=tmp_path / "outside")
    rows = [{"image": "own.png"}, {"image": url}, {"image": {"path": url, "bytes": None}}]
    source = open_source(write_json(tmp_path / "data" / "a.json", rows))
    for index in (1, 2):
        with pytest.raises(BadRow, match="picture"):
            source[index]


def test_archives_of_the_hub_and_of_the_folder_are_read_within_bounds(tmp_path, monkeypatch):
    opened = []

    def open_file(url, mode):
        opened.append(url)
        return io.BytesIO(picture_bytes())

    rows = [
        {"image": {"path": path}} for path in ("hf://datasets/a/b@main/c.png", "zip://c.png::hf://datasets/a/b.zip")
    ]
    write_json(tmp_path / "a.json", rows)
    with monkeypatch.context() as patched:
        patched.setattr(fsspec, "open", open_file)
        source = open_source(tmp_path / "a.json")
        assert [source[i] for i in range(2)] == [{"image": picture_bytes()}] * 2
    assert set(opened) == {row["image"]["path"] for row in rows}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture_bytes())
        with archive.open("huge.png", "w", force_zip64=True) as member:
            for _ in range(MAX_IMAGE_BYTES // 2**20 + 1):
                member.write(bytes(2**20))
    source = open_source(write_json(tmp_path / "b.json", [{"image": f"zip://{n}.png::a.zip"} for n in ("a", "huge")]))
    assert source[0] == {"image": picture_bytes()}
    with pytest.raises(BadRow, match=f"{MAX_IMAGE_BYTES}"):
        source[1]


# Nothing in one row ends a training


def test_one_deep_or_endless_value_is_one_bad_row(tmp_path):
    save(tmp_path / "0.png")
    good = '{"image": "0.png", "text": "a"}'
    deep = '{"image": "0.png", "x": ' + "[" * 50_000 + '"]\\"["' + "]" * 50_000 + "}"
    long = '{"image": "0.png", "text": ' + "9" * 5000 + "}"
    rows = [good, deep, long, '{"image": "0.png", "id": {"a": [1]}}', good]
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for path in ("a.json", "a.jsonl"):
        source = open_source(tmp_path / path)
        assert len(source) == 5
        assert [source[i]["captions"] for i in (0, 4)] == [["a"], ["a"]]
        assert source[3]["id"] == "{'a': [1]}"
        for index in (1, 2):
            with pytest.raises(BadRow, match=f"row {index}"):
                source[index]
    write_tar(tmp_path / "a.tar", [(f"{n}.json", row.encode()) for n, row in enumerate(rows)])
    source = open_source(tmp_path / "a.tar")
    streamed = list(open_stream(tmp_path / "a.tar"))
    for index in (1, 2):
        with pytest.raises(BadRow, match=f"'{index}'"):
            source[index]
        assert streamed[index].keys() == {"unreadable"}
    assert streamed[4] == source[4]


def test_huge_and_sparse_members_are_bad_rows(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"p"))
            if name == "a.png":
                # GNU's sparse format 1.0: a member of 4 TiB of which the shard holds one block.
                sparse = tarfile.TarInfo("b.png")
                sparse.size = 512
                sparse.pax_headers = {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": "b.png",
                    "GNU.sparse.realsize": str(2**42),
                }
                tar.addfile(sparse, io.BytesIO(b"0\n".ljust(512, b"\0")))
    source = open_source(path)
    assert [source[0]["image"], source[2]["image"]] == [b"p", b"p"]
    with pytest.raises(BadRow, match=f"{MAX_SAMPLE_BYTES}"):
        source[1]
    assert [row.keys() == {"unreadable"} for row in open_stream(path)] == [False, True, False]
    # A hole on this disk: a terabyte that nobody wrote.
    with open(path, "r+b") as file:
        header = tarfile.TarInfo("d.png")
        header.size = 2**40
        file.seek(-(-os.path.getsize(path) // 512) * 512)
        while True:
            file.seek(-512, os.SEEK_CUR)
            if file.read(512).strip(b"\0"):
                break
            file.seek(-512, os.SEEK_CUR)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + header.size + 1024)
    source = open_source(path)
    with pytest.raises(BadRow, match=f"{MAX_SAMPLE_BYTES}"):
        source[3]


def test_text_that_is_no_utf_8_is_a_bad_row(tmp_path):
    texts = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    pictures = pa.array([picture_bytes()] * 3, pa.binary())
    pq.write_table(pa.table({"image": pictures, "text": texts}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert [source[i]["captions"] for i in (0, 2)] == [["a"], ["c"]]
    with pytest.raises(BadRow, match="UnicodeDecodeError"):
        source[1]
    assert [row.keys() == {"unreadable"} for row in open_stream(tmp_path / "a.parquet")] == [False, True, False]


def test_reasons_are_short(tmp_path):
    save(tmp_path / "0.png")
    long, picture = "a" * 10**6, {"image": "0.png"}
    rows = [
        {"image": long},
        {"image": "../" + long},
        {"image": {"path": "https://" + long}},
        {"image": "data:;base64," + "?" * 10**6},
        {**picture, "captions": [long, ""]},
        {**picture, "captions": [[long]]},
        {**picture, "questions": ["?"], "answers": [long], "swaps": [long]},
        {**picture, "questions": ["?"], "answers": ["a"], "depends_on": [long]},
        {"conversations": long},
        {"conversations": [{"from": long, "value": "a"}]},
        {"conversations": [{"from": "human", "value": [long]}]},
        {"conversations": [{"from": "human", "value": [{"type": long}]}]},
        {f"{n}{long}": 1 for n in range(3)},
        {**picture, "images": long},
        {**picture, "id": long, "captions": [" "]},
    ]
    source = open_source(write_json(tmp_path / "a.json", [picture, *rows]))
    for index in range(1, len(source)):
        with pytest.raises(BadRow) as info:
            source[index]
        assert len(str(info.value)) <= 1000, index
    for row in ({"messages": long}, {"messages": [{"role": long, "content": [{"type": long}]}]}, {"captions": [long]}):
        with pytest.raises(BadRow) as info:
            check_row({**row, long: 1}, "a row")
        assert len(str(info.value)) <= 1000


def test_patterns_name_files_only(tmp_path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(ValueError, match="a.tar"):
        open_source(tmp_path / "*.tar")


def test_streams_of_no_usable_rows_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n}.png", b"") for n in range(3)])
    write_parquet(tmp_path / "a.parquet", [{"image": b""}] * 3)
    for path in ("a.tar", "a.parquet"):
        with pytest.raises(ValueError, match="3 "):
            open_stream(tmp_path / path)

"""Cached latents: the model's own, the same bytes after any interruption, and refused where they do not belong."""

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import mmar
from helpers import tiny_model
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from squares import make_processor
from torch.utils.data import DataLoader, Subset

from mmar.command import run_command
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from mmar.training import latents
from mmar.training.latents import LatentCache, cache_latents, pictures_sha256, vae_sha256
from mmar.training.rows import BadRow


COPIES = 2
DEPENDS_ON = ["picture", "content", "style"]


class Rows(list):
    """A source of rows in memory; an exception among them is raised."""

    name = "rows"

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if isinstance(row, Exception):
            raise row
        return row


def make_picture(seed):
    """A box of some colour somewhere on white, as a PNG file."""
    numbers = torch.randint(256, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    picture, buffer = Image.new("RGB", (12, 10), "white"), io.BytesIO()
    left, top = numbers[0] % 6, numbers[1] % 5
    ImageDraw.Draw(picture).rectangle((left, top, left + 5, top + 4), fill=tuple(numbers[2:]))
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(count=10, **extra):
    return Rows({"image": make_picture(i), "id": f"n{i}", **extra} for i in range(count))


def rows_with_faults():
    """Ten rows, three of them broken, of 3 shards at 4 rows per shard."""
    rows = make_rows(10, depends_on=DEPENDS_ON)
    # Pillow's message on these names an object by its address.
    rows[2] = {"image": b"no picture", "id": 77}
    rows[5] = BadRow("it has no caption.")
    rows[8] = {"images": [make_picture(0), make_picture(1)]}
    return rows


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def encode(rows, model, processor, folder, **options):
    return cache_latents(rows, model, processor, folder, **{"num_copies": COPIES, "shard_size": 4, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_those_of_the_model(tmp_path, model, processor):
    rows = make_rows(6)
    assert encode(rows, model, processor, tmp_path, num_copies=0, batch_size=3) == []
    cache = LatentCache(tmp_path)
    assert len(cache) == 6 and not cache.has_views
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    expected = torch.stack(model.encode_image_distributions(pixel_values), dim=1)
    for i in range(6):
        assert cache[i].keys() == {"picture"}
        assert cache[i]["picture"].shape == (1, 2, 4, 4, 4) and cache[i]["picture"].dtype == torch.half
        # Half precision has 11 bits.
        torch.testing.assert_close(cache[i]["picture"][0].float(), expected[i], atol=1e-5, rtol=2**-11)
    assert torch.equal(cache[-1]["picture"], cache[5]["picture"])
    with pytest.raises(IndexError):
        cache[6]


def test_views_are_those_of_their_seed_row_and_number(tmp_path, model, processor):
    rows = make_rows(5, depends_on=DEPENDS_ON)
    state = torch.get_rng_state()
    encode(rows, model, processor, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    cache = LatentCache(tmp_path / "a")
    assert cache.has_views
    assert cache.index["kinds"] == {"picture": 1 + COPIES, "content": COPIES}
    for i, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["image"]))
        views = {"picture": [picture], "content": []}
        for kind, number in (("picture", 0), ("content", 1)):
            for copy in range(COPIES):
                torch.manual_seed(latents.stable_hash(0, i, number, copy))
                changed = latents.restyle(picture) if kind == "content" else picture
                views[kind].append(latents.distort(changed))
        for kind, own in views.items():
            pixel_values = processor.image_processor(own, return_tensors="pt")["pixel_values"]
            expected = torch.stack(model.encode_image_distributions(pixel_values), dim=1)
            torch.testing.assert_close(cache[i][kind].float(), expected, atol=1e-5, rtol=2**-11)
    # No two views are the same, and another seed gives others of the same pictures.
    means = [view[0] for i in range(5) for own in cache[i].values() for view in own]
    assert len({tuple(mean.flatten().tolist()) for mean in means}) == 5 * (1 + 2 * COPIES)
    encode(rows, model, processor, tmp_path / "b", seed=1)
    other = LatentCache(tmp_path / "b")
    assert torch.equal(other[3]["picture"][0], cache[3]["picture"][0])
    assert not torch.equal(other[3]["picture"][1], cache[3]["picture"][1])


def test_content_views_only_where_an_answer_depends_on_them(tmp_path, model, processor):
    rows = make_rows(6)
    rows[3] = {**rows[3], "depends_on": ["style", "picture"]}
    rows[4] = BadRow("broken")
    encode(rows, model, processor, tmp_path / "without")
    assert LatentCache(tmp_path / "without")[0].keys() == {"picture"}
    rows[5] = {**rows[5], "depends_on": None}
    rows[2] = {**rows[2], "depends_on": ["content"]}
    encode(rows, model, processor, tmp_path / "with")
    assert {kind: len(own) for kind, own in LatentCache(tmp_path / "with")[0].items()} == {
        "picture": 1 + COPIES,
        "content": COPIES,
    }
    # The first picture of a row counts once, without views, whatever hangs on it.
    encode(rows, model, processor, tmp_path / "none", num_copies=0)
    assert {kind: len(own) for kind, own in LatentCache(tmp_path / "none")[0].items()} == {"picture": 1}


def test_broken_rows_are_marked_and_told(tmp_path, model, processor):
    rows = rows_with_faults()
    broken = encode(rows, model, processor, tmp_path)
    assert [(entry["row"], entry["id"]) for entry in broken] == [(2, 77), (5, None), (8, None)]
    assert "pictures that can be read" in broken[0]["reason"] and " at 0x" not in broken[0]["reason"]
    assert broken[1]["reason"] == "it has no caption."
    assert "expected one picture, since latents are kept by row; got 2." in broken[2]["reason"]
    assert json.loads((tmp_path / "broken.json").read_text()) == broken
    cache = LatentCache(tmp_path)
    for i in range(10):
        if i in (2, 5, 8):
            with pytest.raises(BadRow, match=f"row {i}"):
                cache[i]
        else:
            assert cache[i]["picture"].shape == (1 + COPIES, 2, 4, 4, 4)
    # The rows beside a broken one are their own.
    encode(make_rows(10, depends_on=DEPENDS_ON), model, processor, tmp_path / "good")
    good = LatentCache(tmp_path / "good")
    for i in (0, 1, 3, 4, 6, 7, 9):
        for kind in ("picture", "content"):
            # Other batches, other order of sums.
            torch.testing.assert_close(cache[i][kind].float(), good[i][kind].float(), atol=1e-4, rtol=2**-10)
    shard = load_file(tmp_path / "latents-00000-of-00003.safetensors")
    assert shard["broken"].tolist() == [False, False, True, False]
    assert shard["picture"].shape == (4, 1 + COPIES, 2, 4, 4, 4) and not shard["picture"][2].any()
    assert shard["content"].shape == (4, COPIES, 2, 4, 4, 4) and not shard["content"][2].any()


def test_all_rows_broken(tmp_path, model, processor):
    rows = Rows([{"image": b"x"}, {"captions": ["a"]}, BadRow("nothing")])
    with pytest.raises(ValueError, match="'rows'"):
        encode(rows, model, processor, tmp_path)
    assert len(json.loads((tmp_path / "broken.json").read_text())) == 3


def test_a_picture_without_room_for_views_is_broken(tmp_path, model, processor):
    rows = make_rows(2, depends_on=["content"])
    buffer = io.BytesIO()
    Image.new("RGB", (1, 9)).save(buffer, "PNG")
    rows[1]["image"] = buffer.getvalue()
    # A quarter of the views have lines drawn, for which a width of one pixel is too little.
    (broken,) = encode(rows, model, processor, tmp_path / "views", num_copies=40)
    assert broken["row"] == 1 and "no view of its picture of (1, 9) pixels can be drawn" in broken["reason"]
    assert encode(rows, model, processor, tmp_path / "plain", num_copies=0) == []


def test_a_source_that_can_no_longer_be_read_ends_it(tmp_path, model, processor):
    rows = make_rows(10)
    encode(rows, model, processor, tmp_path / "whole", num_copies=0)
    rows[6] = ValueError("a shard vanished")
    with pytest.raises(ValueError, match="shard"):
        encode(rows, model, processor, tmp_path / "a", num_copies=0)

    class Vanishing(Rows):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 16:  # the first ten are the fingerprint's
                raise ValueError("a shard vanished")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="shard"):
        encode(Vanishing(make_rows(10)), model, processor, tmp_path / "b", num_copies=0)
    assert sorted(contents(tmp_path / "b")) == ["index.json", "latents-00000-of-00003.safetensors"]
    encode(make_rows(10), model, processor, tmp_path / "b", num_copies=0)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_what_the_vae_breaks_on_is_broken(tmp_path, model, processor, monkeypatch):
    def encode_image_distributions(self, pixel_values):
        mean, std = original(self, pixel_values)
        mean[2, 0, 0, 0] = 1e6  # beyond half precision
        return mean, std

    original = MMARForConditionalGeneration.encode_image_distributions
    monkeypatch.setattr(MMARForConditionalGeneration, "encode_image_distributions", encode_image_distributions)
    rows = make_rows(4)
    rows[1] = BadRow("nothing")
    broken = encode(rows, model, processor, tmp_path, num_copies=0)
    assert [entry["row"] for entry in broken] == [1, 3] and "beyond half precision" in broken[1]["reason"]


class Killed(Exception):
    pass


def test_a_resumed_run_writes_the_same_bytes(tmp_path, model, processor, monkeypatch):
    rows = rows_with_faults()
    encode(rows, model, processor, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert sorted(expected) == ["broken.json", "index.json"] + [
        f"latents-0000{i}-of-00003.safetensors" for i in range(3)
    ]
    folder, second = tmp_path / "resumed", "latents-00001-of-00003.safetensors"

    def write(path, content):
        if path.name == second:
            # As a SIGKILL leaves it: half written, under its other name.
            path.with_name(f".{path.name}.abc.unfinished").write_bytes(content[:500])
            raise Killed
        original(path, content)

    original = latents.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_whole", write)
        with pytest.raises(Killed):
            encode(rows, model, processor, folder)
    assert sorted(contents(folder)) == [
        f".{second}.abc.unfinished",
        "index.json",
        "latents-00000-of-00003.safetensors",
    ]
    message = "expected 3 shards of latents in .*; 2 are missing, the first of them latents-00001-of-00003.safetensors"
    with pytest.raises(ValueError, match=message + ". Call `cache_latents` with the same"):
        LatentCache(folder)
    # What is done stays as it is: the second run writes two shards and the list of broken rows.
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(
            latents, "write_whole", lambda path, content: written.append(path.name) or original(path, content)
        )
        encode(rows, model, processor, folder)
    assert written == [second, "latents-00002-of-00003.safetensors", "broken.json"]
    assert contents(folder) == expected
    # Nor does it hang on the random numbers drawn before, on workers or on processes.
    torch.manual_seed(123)
    for process in (2, 0):
        assert encode(rows, model, processor, tmp_path / "two", num_processes=3, process_index=process) is None
    with pytest.raises(ValueError, match="latents-00001-of-00003"):
        LatentCache(tmp_path / "two")
    assert len(encode(rows, model, processor, tmp_path / "two", num_processes=3, process_index=1)) == 3
    assert contents(tmp_path / "two") == expected
    encode(rows, model, processor, tmp_path / "workers", num_workers=2)
    assert contents(tmp_path / "workers") == expected


def test_a_damaged_shard_is_written_again(tmp_path, model, processor, capsys):
    rows = rows_with_faults()
    encode(rows, model, processor, tmp_path)
    expected = contents(tmp_path)
    shard = tmp_path / "latents-00001-of-00003.safetensors"
    other = expected["latents-00000-of-00003.safetensors"].replace(b'\\"cache\\": \\"', b'\\"cache\\": \\"x')
    truncated, shorter = expected[shard.name][:-1], expected["latents-00002-of-00003.safetensors"]
    for content in (truncated, b"", b"x" * 1000, shorter, other):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=shard.name):
            LatentCache(tmp_path)
        encode(rows, model, processor, tmp_path)
        assert str(shard) in capsys.readouterr().err
        assert contents(tmp_path) == expected


def test_a_shard_of_another_cache_is_refused(tmp_path, model, processor):
    """Of the same rows, sizes and names, but of another VAE, seed or pictures."""
    rows = make_rows(6, depends_on=DEPENDS_ON)
    encode(rows, model, processor, tmp_path / "ours")
    shard = tmp_path / "ours" / "latents-00000-of-00002.safetensors"
    others = {
        "vae": (rows, tiny_model(seed=1), {}),
        "seed": (rows, model, {"seed": 5}),
        "pictures": (Rows([{**rows[0], "image": make_picture(99)}, *rows[1:]]), model, {}),
    }
    for name, (source, own_model, options) in others.items():
        encode(source, own_model, processor, tmp_path / name, **options)
        shard.write_bytes((tmp_path / name / shard.name).read_bytes())
        with pytest.raises(ValueError, match=shard.name):
            LatentCache(tmp_path / "ours")


def test_a_folder_begun_otherwise_is_refused(tmp_path, model, processor):
    rows = make_rows(6, depends_on=DEPENDS_ON)
    encode(rows, model, processor, tmp_path)
    before = contents(tmp_path)

    def changed_row(index, **change):
        return Rows({**row, **(change if i == index else {})} for i, row in enumerate(rows))

    cases = [
        (rows, model, {"num_copies": 1}, "its number of copies is 2, now it is 1"),
        (rows, model, {"seed": 5}, "its seed is 0, now it is 5"),
        (rows, model, {"shard_size": 3}, "its shard size is 4, now it is 3"),
        (rows, tiny_model(seed=1), {}, "its fingerprint of the VAE is "),
        (make_rows(7, depends_on=DEPENDS_ON), model, {}, "its number of rows is 6, now it is 7"),
        (changed_row(4, image=make_picture(99)), model, {}, "its fingerprint of the pictures is "),
        (Rows(reversed(rows)), model, {}, "its fingerprint of the pictures is "),
        (changed_row(4, depends_on=["style"]), model, {}, "its fingerprint of the pictures is "),
    ]
    for source, own_model, options, message in cases:
        with pytest.raises(ValueError, match=message):
            encode(source, own_model, processor, tmp_path, **options)
    # Texts may be mended, and the data may move.
    moved = changed_row(4, captions=["a box"])
    moved.name = "elsewhere"
    encode(moved, model, processor, tmp_path)
    assert contents(tmp_path) == before


def test_check_tells_other_models_and_other_data(tmp_path, model, processor):
    rows = rows_with_faults()
    encode(rows, model, processor, tmp_path)
    cache = LatentCache(tmp_path)
    cache.check(model, rows)
    with pytest.raises(ValueError, match="VAE"):
        cache.check(tiny_model(seed=1), rows)
    with pytest.raises(ValueError, match="'rows'"):
        cache.check(model, Rows(list.__getitem__(rows, slice(9))))
    rows[9] = {**rows[9], "image": make_picture(3)}
    with pytest.raises(ValueError, match="'rows'"):
        cache.check(model, rows)
    # Of the same VAE, on larger images.
    larger = tiny_model()
    larger.vae = model.vae
    larger.config.image_size *= 2
    with pytest.raises(ValueError, match=r"\[4, 8, 8\]"):
        cache.check(larger, rows)


def test_a_row_does_not_carry_its_shard_along(tmp_path, model, processor):
    encode(make_rows(6), model, processor, tmp_path)
    for value in LatentCache(tmp_path)[1].values():
        assert value.untyped_storage().nbytes() == value.nbytes


def test_the_vae_fingerprint_holds_weights_and_scale_and_nothing_else(tmp_path, model):
    expected = vae_sha256(model)
    assert len(expected) == 64
    model.save_pretrained(tmp_path)
    assert vae_sha256(MMARForConditionalGeneration.from_pretrained(tmp_path, dtype="bfloat16")) == expected
    assert vae_sha256(tiny_model(seed=0, plora_rank=2, plora_alpha=4.0)) != expected  # drawn otherwise
    other = MMARForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    assert vae_sha256(other) == expected
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 1e-3
    assert vae_sha256(other) != expected
    scaled = MMARForConditionalGeneration.from_pretrained(tmp_path)
    scaled.vae.register_to_config(scaling_factor=1.25)
    assert vae_sha256(scaled) != expected


def test_images_of_the_same_bytes_in_another_shape_have_another_fingerprint():
    shapes = [("L", (4, 2)), ("L", (2, 4)), ("P", (4, 2))]
    fingerprints = {pictures_sha256([{"image": Image.new(mode, size)}]) for mode, size in shapes}
    assert len(fingerprints) == 3


def test_the_pictures_fingerprint_is_of_the_content(tmp_path):
    rows = make_rows(3)
    expected = pictures_sha256(rows)
    paths = Rows()
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(row["image"])
        paths.append({"image": str(tmp_path / f"{i}.png")})
    assert pictures_sha256(paths) == expected
    opened = Rows({"image": Image.open(row["image"])} for row in paths)
    assert pictures_sha256(opened) == pictures_sha256(opened) != expected
    # Of many rows it looks at some, the last among them.
    many = Rows({"image": b"%d" % i} for i in range(5000))
    expected = pictures_sha256(many)
    assert pictures_sha256(Rows([*many[:4999], {"image": b"other"}])) != expected
    assert pictures_sha256(Rows(many[1:] + many[:1])) != expected


def test_a_full_disk_ends_it_and_leaves_nothing_half_written(tmp_path, model, processor, monkeypatch):
    rows = make_rows(10)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # index.json, the first shard, the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="latents-00001-of-00003.safetensors"):
            encode(rows, model, processor, tmp_path)
    assert sorted(contents(tmp_path)) == ["index.json", "latents-00000-of-00003.safetensors"]
    encode(rows, model, processor, tmp_path)
    assert len(LatentCache(tmp_path)) == 10


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_reader_works_in_workers(tmp_path, model, processor, context):
    encode(rows_with_faults(), model, processor, tmp_path)
    cache = LatentCache(tmp_path)
    expected = {i: cache[i]["picture"] for i in (9, 0, 4)}
    loader = DataLoader(cache, sampler=[9, 0, 4], batch_size=None, num_workers=1, multiprocessing_context=context)
    for i, read in zip(expected, loader, strict=True):
        assert torch.equal(read["picture"], expected[i])
    # A pickle names the folder, and holds nothing of it.
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    assert torch.equal(pickle.loads(pickled)[9]["picture"], expected[9])
    # What is changed in a sample is not changed in the cache.
    cache[0]["picture"].zero_()
    assert torch.equal(cache[0]["picture"], expected[0])
    # A shard that disappears is named.
    reader = pickle.loads(pickled)
    (tmp_path / "latents-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="latents-00001-of-00003.safetensors"):
        reader[4]


def test_bad_folders_and_arguments(tmp_path, model, processor):
    with pytest.raises(ValueError, match="index.json"):
        LatentCache(tmp_path / "none")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json"):
        LatentCache(tmp_path)
    (tmp_path / "index.json").write_text("[1]")
    with pytest.raises(ValueError, match="index"):
        encode(make_rows(1), model, processor, tmp_path)
    cases = [
        ({"num_copies": -1}, "`num_copies` must be at least 0; got -1"),
        ({"shard_size": 0}, "`shard_size` must be at least 1; got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0; got -1"),
        ({"num_processes": 2, "process_index": 2}, "in \\[0, `num_processes`\\); got 2 with 2 processes"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            encode(make_rows(1), model, processor, tmp_path / "new", **options)
    with pytest.raises(ValueError, match="row"):
        encode(Rows(), model, processor, tmp_path / "new")
    with pytest.raises(ValueError, match="processor"):
        encode(make_rows(1), tiny_model(image_size=16), processor, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_killed_and_finished(tmp_path, model, processor, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [{"photo": {"bytes": make_picture(i), "path": None}, "captions": ["a box"]} for i in range(200)]
    rows[7]["photo"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = [str(tmp_path / "rows.parquet"), "--model", str(tmp_path / "model"), "--num_copies", "1"]
    words += ["--shard_size", "2", "--columns", "image=photo", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def run(*arguments):
        mmar("cache-latents", *words, *arguments)
        return capsys.readouterr().out

    # In the fourth file: the index and two shards are there.
    command = [sys.executable, str(Path(__file__).parents[1] / "killed.py"), "4", "mmar", "cache-latents"]
    done = subprocess.run([*command, *words, str(killed)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(killed.glob("latents-*.safetensors"))) == 2 and list(killed.glob(".*.unfinished"))
    message = "expected 100 shards .* are missing.*To go on: mmar cache-latents .* --columns image=photo"
    with pytest.raises(ValueError, match=message):
        LatentCache(killed)
    out = run(whole)
    assert f"{whole}: latents of 200 rows, 1 of them broken." in out and "broken: row 7, id None: " in out
    # torchrun tells each process which it is.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "the shards of process 1 of 2 are written" in run(killed)
    monkeypatch.setenv("RANK", "0")
    assert "latents of 200 rows, 1 of them broken." in run(killed)
    first, second = contents(whole), contents(killed)
    indices = [json.loads(files.pop("index.json")) for files in (first, second)]
    assert first == second and len(first) == 101
    assert indices[0] | {"command": None} == indices[1] | {"command": None}
    with pytest.raises(ValueError, match="seed.*0.*3"):
        run(killed, "--seed", 3)
    with pytest.raises(ValueError, match="--columns"):
        run(killed, "--columns", "jpg")


def test_the_command_takes_pictures_of_another_folder(tmp_path, model, processor, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "rows").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(make_picture(i))
    rows = [{"image": f"{i}.png", "text": "a box"} for i in range(3)]
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(rows))
    words = [tmp_path / "rows" / "rows.json", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    words += ["--image_folder", tmp_path / "pictures"]
    mmar("cache-latents", *words)
    cache = LatentCache(tmp_path / "out")
    assert len(cache) == 3 and f"--image-folder {tmp_path / 'pictures'}" in cache.index["command"]


def test_a_shard_under_the_number_of_another_is_refused(tmp_path, model, processor, capsys):
    rows = make_rows(8)
    encode(rows, model, processor, tmp_path)
    first, second = (tmp_path / f"latents-0000{i}-of-00002.safetensors" for i in range(2))
    expected = contents(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=second.name):
        LatentCache(tmp_path)
    # The command writes it again.
    encode(rows, model, processor, tmp_path)
    assert str(second) in capsys.readouterr().err and contents(tmp_path) == expected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.with_name("latents-00000-of-00003.safetensors").read_bytes()),
    ],
    ids=["cut", "empty", "zeros", "removed", "another shard"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changes_while_it_is_read_ends_it_with_one_line(tmp_path, model, processor, spoil, num_workers):
    """In place, under the eyes of a reader that has it open; a mapped file would end the process, or give zeros."""
    encode(make_rows(10), model, processor, tmp_path)
    cache = LatentCache(tmp_path)
    assert cache[5]["picture"].any()
    spoil(tmp_path / "latents-00001-of-00003.safetensors")

    def read():
        list(DataLoader(Subset(cache, [0, 5]), batch_size=None, num_workers=num_workers))

    with pytest.raises(SystemExit) as ended:
        run_command(read)
    assert ended.value.code.startswith("error: expected ")
    assert "latents-00001-of-00003.safetensors" in ended.value.code and "\n" not in ended.value.code
    assert cache[0]["picture"].any() and cache[9]["picture"].any()


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": 10**12},
        {"num_rows": 10**12, "shard_size": 1},
        {"num_rows": 10**30},
        {"num_rows": -1},
        {"num_rows": "10"},
        {"num_rows": 10.0},
        {"shard_size": 0},
        {"latent_shape": [4, 4]},
        {"latent_shape": 4},
        {"latent_shape": [4, 4, 10**12]},
        {"kinds": {}},
        {"kinds": {"picture": 0}},
        {"kinds": ["picture"]},
    ],
    ids=str,
)
def test_an_index_that_is_broken_is_refused_at_once(tmp_path, model, processor, change):
    encode(make_rows(6), model, processor, tmp_path)
    file = tmp_path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    start = time.monotonic()
    with pytest.raises(ValueError, match="expected|must be"):
        LatentCache(tmp_path)
    assert time.monotonic() - start < 5


def test_an_index_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match="index.json"):
        LatentCache(tmp_path)

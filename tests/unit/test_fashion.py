"""Fashion-MNIST's rows, shades, and the judge of drawings."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmar.ablations import fashion
from mmar.ablations.fashion import frechet_distance, on_white, shade_of, to_grey
from mmar.training.emoji_rows import read_rows


NAMES, SHADES = ("bar", "cross"), {"dark": 100, "bright": 220}


def picture(name, shade, shift=0):
    grey = np.zeros((28, 28), np.uint8)
    grey[12:16, 4:24] = SHADES[shade]
    if name == "cross":
        grey[4:24, 12:16] = SHADES[shade]
    return np.roll(grey, shift, axis=1)


def png(grey):
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A set of two shapes in two shades, in the columns of the real one."""
    folder = tmp_path_factory.mktemp("fashion")
    for split, number in (("train", 80), ("test", 12)):
        rows = []
        for index in range(number):
            name, shade = NAMES[index % 2], list(SHADES)[index // 2 % 2]
            rows.append(
                {
                    "image": {"bytes": png(picture(name, shade, index % 3 - 1)), "path": f"{index}.png"},
                    "caption": f"a photo of a {shade} {name}",
                    "captions": [f"a photo of a {shade} {name}", f"a {name} in {shade} tone"],
                    "label": index % 2,
                    "label_name": name,
                    "shade": shade,
                    "foreground_mean": float(SHADES[shade]),
                    "split": split,
                    "license": "MIT",
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fashion", *map(str, words)])
    fashion.main()


def test_rows_judge_and_score(source, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--num_test"):
        run(monkeypatch, "rows", source, "--out", tmp_path, "--num_test", 300)
    run(monkeypatch, "rows", source, "--out", tmp_path, "--num_rows", 60, "--num_test", 4)
    assert json.loads(capsys.readouterr().out) == {"train": 60, "test": 12, "test_small": 4}
    rows = read_rows(tmp_path / "test_small.parquet")
    assert rows[0]["questions"] == fashion.QUESTIONS
    assert rows[0]["answers"] == ["a bar in dark tone", "bar", "dark"] and len(rows) == 4

    monkeypatch.setattr(fashion, "BATCH_SIZE", 16)
    judge = tmp_path / "judge.safetensors"
    run(monkeypatch, "judge", "--data", tmp_path / "train.parquet", "--out", judge, "--num_epochs", 15)
    assert json.loads(judge.with_suffix(".json").read_text()) == sorted(NAMES)

    def scored(swapped):
        folder = tmp_path / f"drawn{swapped}"
        folder.mkdir()
        lines = []
        for index in range(8):
            name, shade = NAMES[index % 2], list(SHADES)[index // 4]
            drawn = Image.open(io.BytesIO(on_white(png(picture(NAMES[1 - index % 2] if swapped else name, shade)))))
            drawn.convert("RGB").save(folder / f"{index}.png")
            lines.append({"file": f"{index}.png", "label": name, "style": shade})
        (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        capsys.readouterr()
        run(monkeypatch, "score", folder, "--judge", judge, "--reference", tmp_path / "test.parquet")
        return json.loads(capsys.readouterr().out)

    right, wrong = scored(False), scored(True)
    assert (right["n"], right["name_top1"], right["style"]) == (8, 1.0, 1.0)
    assert (wrong["name_top1"], wrong["style"]) == (0.0, 1.0)
    assert right["frechet_real"] >= 0 and right["frechet"] >= 0


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    for words, message in (
        (("rows", tmp_path, "--out", tmp_path), "train-00000-of-00001.parquet"),
        (
            ("judge", "--data", tmp_path / "none.parquet", "--out", tmp_path / "j.safetensors"),
            "parquet",
        ),
        (
            ("score", tmp_path, "--judge", tmp_path / "j.safetensors", "--reference", tmp_path),
            "captions.jsonl",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, *words)
    with pytest.raises(ValueError, match="128.*4"):
        fashion.train_judge(torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.long), 2, 1, 0)
    with pytest.raises(SystemExit):
        run(monkeypatch, "rows", tmp_path, "--out", tmp_path, "--num_rows", 0)


def test_a_rows_picture_is_the_original_again_for_the_judge():
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    row = Image.open(io.BytesIO(on_white(png(grey))))
    assert row.size == (32, 32) and row.getpixel((0, 0)) == 255
    assert (to_grey(row) == grey).all() and (to_grey(row.convert("RGB")) == grey).all()
    with pytest.raises(ValueError, match="28 x 28"):
        to_grey(Image.fromarray(grey))


def test_shades_are_the_data_sets():
    for value, shade in ((100, "dark"), (141, "dark"), (142, "grey"), (182, "grey"), (183, "bright")):
        grey = np.zeros((28, 28), np.uint8)
        grey[5:20, 5:20] = value
        grey[0] = 20  # background
        assert shade_of(grey) == shade
    assert shade_of(np.zeros((28, 28), np.uint8)) == "dark"


def test_frechet_distance_of_normals_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator).double()
    a = torch.linalg.solve(torch.linalg.cholesky(a.T.cov()), (a - a.mean(0)).T).T  # mean 0, covariance 1, exactly
    scales, offset = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    # Of commuting covariances: |m|^2 + sum (s - 1)^2.
    assert frechet_distance(a * scales + offset, a) == pytest.approx(5 + 0 + 1 + 4, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)

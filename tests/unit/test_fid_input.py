"""What the FID command reads: captions, weights, statistics and pictures; none of it needs torch-fidelity."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmar.evaluation import fid


class Malicious:
    """What a pickle can do: write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_captions(path, annotations):
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    return path


def annotation(number, picture, caption="a dog"):
    return {"id": number, "image_id": picture, "caption": caption}


# 4 pictures; picture p has p captions.
ROWS = [annotation(10 * picture + i, picture) for picture in range(1, 5) for i in range(picture)]


def test_captions_are_stripped(tmp_path):
    path = write_captions(tmp_path / "captions.json", [{**annotation(1, 2, " a dog\n"), "extra": 0}])
    assert fid.read_captions(path) == [annotation(1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected captions in COCO's layout .* got something else"),
        ("[]", "got something else"),
        ('{"annotations": [{"id": 1}]}', "got something else .KeyError: 'image_id'"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": 3}]}', "got something else"),
        ('{"annotations": []}', "has no annotations"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": " "}]}', "that of 1 is empty"),
    ],
)
def test_other_captions(tmp_path, text, message):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        fid.read_captions(tmp_path / "captions.json")
    with pytest.raises(ValueError, match="none.json"):
        fid.read_captions(tmp_path / "none.json")


def test_one_caption_of_each_picture_first():
    chosen = fid.choose_captions(ROWS, len(ROWS))
    assert sorted(row["id"] for row in chosen) == [row["id"] for row in ROWS]
    rounds = [4, 3, 2, 1]  # so many pictures have a first, second, third and fourth caption
    for number, start in zip(rounds, (0, 4, 7, 9), strict=True):
        assert len({row["image_id"] for row in chosen[start : start + number]}) == number


def test_the_choice_depends_on_seed_and_ids_only():
    chosen = fid.choose_captions(ROWS, 6, seed=3)
    assert fid.choose_captions(ROWS[::-1], 6, seed=3) == chosen
    assert fid.choose_captions(ROWS, 4, seed=3) == chosen[:4]
    orders = {tuple(row["id"] for row in fid.choose_captions(ROWS, 6, seed)) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("number", [0, 1, 11])
def test_more_captions_than_there_are_or_too_few_are_refused(number):
    with pytest.raises(ValueError, match="`num_prompts`"):
        fid.choose_captions(ROWS, number)


def test_weights_are_tensors_by_name(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        read = fid.read_weights(tmp_path / name)
        assert read.keys() == weights.keys() and torch.equal(read["a"], weights["a"])


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_never_unpickled(tmp_path, legacy):
    written = tmp_path / "written"
    content = {"a": torch.zeros(1), "b": Malicious(written)}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    # And nobody is told to run it, as torch's own message does.
    with pytest.raises(ValueError, match="weights.pth") as told:
        fid.read_weights(tmp_path / "weights.pth")
    assert not written.exists() and "weights_only" not in str(told.value)
    torch.save({"mu": Malicious(written), "sigma": np.zeros((1, 1))}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match="`mu`"):
        fid.read_statistics(tmp_path / "stat.pt")
    np.savez(tmp_path / "stat.npz", mu=np.array([Malicious(written)], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="`mu`"):
        fid.read_statistics(tmp_path / "stat.npz")
    assert not written.exists()
    # The test can fail: that is what the file does.
    pickle.loads(pickle.dumps(Malicious(written)))
    assert written.exists()


def test_other_weights(tmp_path):
    with pytest.raises(ValueError, match="none.pth"):
        fid.read_weights(tmp_path / "none.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="tensors"):
        fid.read_weights(tmp_path / "list.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match="tensors"):
            fid.read_weights(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_npz_and_of_torch_fidelitys_cache(tmp_path, dtype):
    mu, sigma = np.arange(2, dtype=dtype), np.array([[2.0, 0.5], [0.5, 1.0]])
    np.savez(tmp_path / "stat.npz", mu=mu, sigma=sigma)
    torch.save({"mu": mu, "sigma": sigma}, tmp_path / "stat.pt")
    for name in ("stat.npz", "stat.pt"):
        read = fid.read_statistics(tmp_path / name)
        assert read["mu"].dtype == np.float64 and read["about"] is None
        assert np.array_equal(read["mu"], mu) and np.array_equal(read["sigma"], sigma)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "sigma"),
        ({"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, r"their shapes are \(2,\) and \(3, 3\)"),
        ({"mu": np.full(1, np.nan), "sigma": np.zeros((1, 1))}, "NaN or infinite"),
    ],
)
def test_other_statistics(tmp_path, arrays, message):
    np.savez(tmp_path / "stat.npz", **arrays)
    with pytest.raises(ValueError, match="`mu`"):
        fid.read_statistics(tmp_path / "stat.npz")
    (tmp_path / "stat.npz").write_text("no arrays")
    with pytest.raises(ValueError, match="`mu`"):
        fid.read_statistics(tmp_path / "stat.npz")


def test_pictures_become_squares(tmp_path):
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "as_drawn.png")
    Image.new("L", (5, 4), 100).save(tmp_path / "grey.png")
    pictures = fid.SquarePictures([tmp_path / f"{name}.png" for name in ("wide", "as_drawn", "grey")], 8)
    assert pictures[0].dtype == torch.uint8 and pictures[0].shape == (3, 8, 8)
    scaled = np.array(wide.resize((16, 8), Image.Resampling.BICUBIC))[:, 4:12]
    assert np.abs(pictures[0].permute(1, 2, 0).numpy().astype(int) - scaled).max() <= 1  # another order of rounding
    assert np.array_equal(pictures[1].permute(1, 2, 0), noise)
    assert (pictures[2] == 100).all()


def test_a_broken_picture_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jpg").write_text("no picture")
    for index, name in enumerate(("a.png", "b.jpg")):
        wrong = fid.SquarePictures([tmp_path / "a.png", tmp_path / "b.jpg"], 8)[index]
        assert wrong.startswith(f"expected a picture at '{tmp_path / name}'; it cannot be read (")


def test_real_pictures_are_found_in_subfolders(tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.JPG", "JPEG")
    with pytest.raises(ValueError, match="2 .*1"):
        fid.find_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "more" / "b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert fid.find_pictures(tmp_path) == [tmp_path / "a.JPG", tmp_path / "more" / "b.png"]


def test_without_torch_fidelity(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"mmar\[eval\]"):
        fid.open_extractor(None, tmp_path / "weights.pth", torch.device("cpu"))


@pytest.mark.parametrize(("name", "weights", "got"), [(None, None, "neither"), ("a:B", "weights.pth", "both")])
def test_inception_or_another_extractor(name, weights, got):
    with pytest.raises(ValueError, match="`inception_weights`"):
        fid.open_extractor(name, weights, torch.device("cpu"))

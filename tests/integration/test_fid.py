"""FID by torch-fidelity: the distance, the weights it is given, and the command from captions to result.json."""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from commands import mmar
from PIL import Image
from safetensors.torch import save_file

from mmar.evaluation import fid


ROOT = Path(__file__).parents[2]
# Where `make test` puts torch-fidelity; see the Makefile.
FOLDER = Path(sys.prefix) / "evaluation"
# What torch-fidelity names of torchvision when it is imported, for data sets that are not used here.
OF_TORCHVISION = {"datasets": ("CIFAR10", "CIFAR100", "STL10"), "transforms": (), "transforms.functional": ()}
EXTRACTOR = "colour_features:ColourFeatures"


def stand_in():
    """A torchvision of names: the published one does not load beside a torch that was built without CUDA."""
    modules = {"torchvision": types.ModuleType("torchvision")}
    for name, classes in OF_TORCHVISION.items():
        module = modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
        for kind in classes:
            setattr(module, kind, type(kind, (), {}))
        parent, _, own = f"torchvision.{name}".rpartition(".")
        setattr(modules[parent], own, module)
    return modules


@pytest.fixture(scope="module", autouse=True)
def fidelity():
    with pytest.MonkeyPatch.context() as patch:
        if FOLDER.is_dir():
            patch.syspath_prepend(FOLDER)
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError):
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                patch.delitem(sys.modules, name)
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        yield pytest.importorskip("torch_fidelity", reason="torch-fidelity is not there; `make test` installs it")


def square_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet(features, others):
    """By symmetric eigenvalues of S1^(1/2) S2 S1^(1/2), where torch-fidelity has those of S1 S2."""
    means, covariances = zip(
        *((x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1)) for x in (features, others)), strict=True
    )
    root = square_root(covariances[0])
    roots = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0))
    return np.sum((means[0] - means[1]) ** 2) + sum(map(np.trace, covariances)) - 2 * roots.sum()


def features_of(files):
    from colour_features import mean_colours

    pictures = np.stack([np.array(Image.open(file).convert("RGB")) for file in files])
    return mean_colours(torch.from_numpy(pictures).permute(0, 3, 1, 2)).double().numpy()


def write_pictures(folder, number, seed, size=64):
    """Pictures of four coloured quarters."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(number):
        quarters = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(quarters.repeat(size // 2, 0).repeat(size // 2, 1)).save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions of 5 pictures, two each; and 20 real pictures."""
    folder = tmp_path_factory.mktemp("coco")
    annotations = [
        {"id": 10 + i, "image_id": i // 2, "caption": f"an emoji of thing {i} in noto style"} for i in range(10)
    ]
    (folder / "captions.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    write_pictures(folder / "real", 20, seed=0)
    return folder


@pytest.fixture
def run(monkeypatch, data):
    monkeypatch.chdir(ROOT)

    def run(out, *arguments, real=None, extractor=("--extractor", EXTRACTOR)):
        words = ["checkpoints/mmar-tiny", "--captions", data / "captions.json", "--real", real or data / "real"]
        words += ["--out", out, "--num_ar_steps", 2, "--num_inference_steps", 2, *extractor, *arguments]
        mmar("evaluate", "fid", *words)
        return json.loads((out / "result.json").read_text())

    return run


# ------------------------------------------------------------------------------------------------------------ distance


def test_the_distance_is_that_of_an_independent_computation(tmp_path, fidelity):
    drawn, real = write_pictures(tmp_path / "a", 15, seed=1), write_pictures(tmp_path / "b", 30, seed=2)
    extractor = fid.open_extractor(EXTRACTOR, None, torch.device("cpu"))
    measured = fid.measure(drawn, tmp_path / "b", extractor, tmp_path, batch_size=4)
    # Both in double; eigenvalues of a product lose half of the digits where they are 0.
    assert measured["fid"] == pytest.approx(frechet(features_of(drawn), features_of(real)), abs=1e-6)
    assert measured["fid"] > 0.01 and measured["num_real"] == 30
    # torch-fidelity's own way, with means in float32.
    whole = fidelity.calculate_metrics(
        input1=fid.SquarePictures(drawn, 64),
        input2=fid.SquarePictures(real, 64),
        fid=True,
        feature_extractor=extractor.get_name(),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert measured["fid"] == pytest.approx(whole[fidelity.KEY_METRIC_FID], abs=1e-5)
    same = fid.measure(drawn, tmp_path / "a", extractor, tmp_path / "same")
    assert same["fid"] == pytest.approx(0, abs=1e-6)


def test_processes_that_read_pictures_change_nothing(tmp_path):
    files = write_pictures(tmp_path / "a", 5, seed=1)
    extractor = fid.open_extractor(EXTRACTOR, None, torch.device("cpu"))
    one, other = (fid.statistics_of(fid.SquarePictures(files, 64), extractor, 2, number) for number in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in ("mu", "sigma"))
    files[3].write_text("no picture")
    with pytest.raises(ValueError, match="03.png"):
        fid.statistics_of(fid.SquarePictures(files, 64), extractor, 2, 1)


@pytest.fixture(scope="module")
def inception(fidelity):
    """torch-fidelity's Inception with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    kind = fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(kind, "load_state_dict", lambda self, weights: None)
        return kind("inception-v3-compat", ["2048"])


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_inception_has_the_weights_of_the_file(tmp_path, inception, name, monkeypatch):
    weights = inception.state_dict()
    torch.save(weights, tmp_path / name) if name.endswith(".pth") else save_file(weights, tmp_path / name)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)  # nothing is downloaded
    opened = fid.open_extractor(None, tmp_path / name, torch.device("cpu"))
    pictures = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened(pictures)[0], inception(pictures)[0])


def test_weights_of_another_network(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="Inception"):
        fid.open_extractor(None, tmp_path / "weights.pth", torch.device("cpu"))


@pytest.mark.parametrize("name", ["colour_features", "colour_features:None_", "no_such_module:A", ":A", "json:loads"])
def test_no_extractor(name):
    with pytest.raises(ValueError, match="`extractor`"):
        fid.open_extractor(name, None, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------- command


def test_from_captions_to_the_result(tmp_path, run, data, capsys):
    out = tmp_path / "out"
    result = run(out, "--num_prompts", 7, "--seed", 3)
    said = capsys.readouterr()
    assert json.loads(said.out) == result and "This is not FID-30K" in said.err
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"pictures/{i:06d}.png" for i in range(7)]
    assert len({row["image_id"] for row in rows[:5]}) == 5
    drawn = [out / row["file"] for row in rows]
    expected = frechet(features_of(drawn), features_of(sorted((data / "real").iterdir())))
    assert result["fid"] == pytest.approx(expected, abs=1e-6)
    assert result["metric"] == "Frechet distance of 7 pictures, not FID-30K" and result["is_fid_30k"] is False
    assert (result["num_prompts"], result["num_pictures_captioned"], result["num_real"]) == (7, 5, 20)
    assert result["resolution"]["drawn"] == 64 and "bicubic" in result["resolution"]["real"]
    assert result["options"]["num_ar_steps"] == 2 and result["options"]["seed"] == 3
    assert result["versions"].keys() >= {"torch", "torch_fidelity", "mmar"}
    assert "--num-prompts 7" in result["command"] and result["model_sha256"]

    # Again, from the statistics that were left: nothing is drawn, and the distance is the same.
    times = {path: path.stat().st_mtime_ns for path in drawn}
    again = run(out, "--num_prompts", 7, "--seed", 3, real=out / "real.npz")
    assert again["fid"] == result["fid"] and again["num_real"] == 20
    assert times == {path: path.stat().st_mtime_ns for path in drawn}
    # And after a picture was lost.
    content = drawn[4].read_bytes()
    drawn[4].unlink()
    assert run(out, "--num_prompts", 7, "--seed", 3)["fid"] == result["fid"]
    assert drawn[4].read_bytes() == content
    with pytest.raises(ValueError, match="seed.*3.*0"):
        run(out, "--num_prompts", 7)


def test_what_is_wrong_shows_before_anything_is_drawn(tmp_path, run, data):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "real.zip").write_text("")
    np.savez(tmp_path / "other.npz", mu=np.zeros(2), sigma=np.zeros(2))
    for real, message in (
        (tmp_path / "none", "`real`"),
        (tmp_path / "real.zip", "another file"),
        (tmp_path / "empty", "at least 2"),
        (tmp_path / "other.npz", "`mu`"),
    ):
        with pytest.raises(ValueError, match=message):
            run(out, "--num_prompts", 2, real=real)
    with pytest.raises(ValueError, match="'none.pth'"):
        run(out, "--num_prompts", 2, extractor=("--inception_weights", "none.pth"))
    with pytest.raises(ValueError, match="`inception_weights`"):
        run(out, "--num_prompts", 2, extractor=())
    for number in (0, 1, 11):
        with pytest.raises(ValueError, match="`num_prompts`"):
            run(out, "--num_prompts", number)
    with pytest.raises(ValueError, match="`num_prompts`"):
        run(out)
    with pytest.raises(typer.BadParameter, match="greater than or equal to 1"):
        run(out, "--num_prompts", 2, "--feature_batch_size", 0)
    assert not out.exists()


def test_a_broken_real_picture_and_statistics_of_others(tmp_path, run):
    real = write_pictures(tmp_path / "real", 3, seed=0)
    real[1].write_bytes(real[1].read_bytes()[:60])
    with pytest.raises(ValueError, match="01.png"):
        run(tmp_path / "out", "--num_prompts", 2, real=tmp_path / "real")
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2  # drawn, and kept
    np.savez(tmp_path / "few.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="few.npz"):
        run(tmp_path / "out", "--num_prompts", 2, real=tmp_path / "few.npz")
    about = json.dumps({"extractor": "colour_features-ColourFeatures", "features": "colours", "size": 256})
    np.savez(tmp_path / "large.npz", mu=np.zeros(12), sigma=np.eye(12), about=about)
    with pytest.raises(ValueError, match="64.*256"):
        run(tmp_path / "out", "--num_prompts", 2, real=tmp_path / "large.npz")

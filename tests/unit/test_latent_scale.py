"""The measured scale is that of the latents, its errors are honest, and it stands in one place."""

import base64
import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import mmar
from diffusers import AutoencoderKL
from helpers import tiny_config, tiny_model
from PIL import Image

from mmar import MMARForConditionalGeneration
from mmar.conversion.latent_moments import MIN_PICTURES, LatentMoments
from mmar.conversion.measure_latent_scale import has_scale, iterate_pictures, load_vae, measure
from mmar.conversion.models import model_class_of


def latents(seed, num_pictures, generator_std=0.5):
    """Pictures whose latents hang together: each has a level and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(num_pictures, 3, 1, 1, generator=generator)
    spread = 1 + torch.rand(num_pictures, 1, 1, 1, generator=generator)
    scale = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    mean = scale * (level + spread * torch.randn(num_pictures, 3, 4, 4, generator=generator)) + 1
    return mean, generator_std * torch.rand(mean.shape, generator=generator)


def test_moments_are_those_of_all_latents_at_once():
    mean, std = latents(0, 100)
    moments = LatentMoments(3)
    for part in zip(mean.split(7), std.split(7), strict=True):
        moments.update(*part)
    assert moments.num_pictures == 100
    expected = mean.double()
    second = expected.square() + std.double().square()  # of samples from the posterior
    variance = second.mean((0, 2, 3)) - expected.mean((0, 2, 3)).square()
    torch.testing.assert_close(moments.mean[:-1], expected.mean((0, 2, 3)))
    torch.testing.assert_close(moments.std[:-1], variance.sqrt())
    torch.testing.assert_close(moments.mean[-1], expected.mean())
    torch.testing.assert_close(moments.std[-1], (second.mean() - expected.mean().square()).sqrt())


def test_errors_are_the_spread_of_repeated_measurements():
    means, stds, errors = [], [], []
    for seed in range(300):
        moments = LatentMoments(3)
        moments.update(*latents(seed, 200))
        means.append(moments.mean)
        stds.append(moments.std)
        errors.append(moments.errors())
    unit = torch.stack(stds).mean(0)
    spread = torch.stack([torch.stack(means).std(0), torch.stack(stds).std(0)]) / unit
    # 300 repetitions tell a std to 4 %; three such errors.
    torch.testing.assert_close(torch.stack(errors).mean(0), spread, rtol=0.12, atol=0)


def test_errors_of_two_pictures_by_hand_and_of_one():
    mean, std = latents(0, 2)
    moments = LatentMoments(3)
    moments.update(mean[:1], std[:1])
    assert torch.equal(moments.errors(), torch.full((2, 4), torch.inf, dtype=torch.float64))
    moments.update(mean[1:], std[1:])
    of_pictures = mean.double().mean((2, 3))
    expected = of_pictures.std(0) / 2**0.5 / moments.std[:-1]
    torch.testing.assert_close(moments.errors()[0, :-1], expected)


def test_converged_are_enough_pictures_of_which_every_error_is_small():
    mean, std = latents(0, MIN_PICTURES)
    moments = LatentMoments(3)
    moments.update(mean[1:], std[1:])
    assert not moments.converged(torch.inf)
    moments.update(mean[:1], std[:1])
    errors = moments.errors()
    assert moments.converged(1.01 * float(errors.max())) and not moments.converged(0.99 * float(errors.max()))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ({}, False),
        ({"scaling_factor": 0.5}, True),
        ({"shift_factor": 0.25}, True),
        ({"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}, True),
    ],
)
def test_any_part_of_a_scale_is_one(scale, expected):
    config = tiny_config().vae_config | {"scaling_factor": 1.0, "shift_factor": None} | scale
    with torch.device("meta"):
        assert has_scale(AutoencoderKL(**config)) is expected


def make_pictures(folder, count, seed=0):
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = generator.integers(0, 256, 3)
        noise = generator.integers(-20, 21, (10, 8, 3))
        Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty pictures as files, one of them broken, and the good ones as parquet."""
    root = tmp_path_factory.mktemp("pictures")
    folder = make_pictures(root / "files", 60)
    files = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.iterdir())]
    (root / "parquet").mkdir()
    pq.write_table(pa.table({"picture": files[:30]}), root / "parquet" / "0.parquet")
    pq.write_table(pa.table({"picture": files[30:]}), root / "parquet" / "1.parquet")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return root


@pytest.fixture
def vae_folder(tmp_path):
    torch.manual_seed(0)
    config = tiny_config().vae_config | {"scaling_factor": 1.0, "shift_factor": None}
    AutoencoderKL(**config).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def run(capsys, *arguments):
    mmar("latent-scale", *arguments)
    return json.loads(capsys.readouterr().out)


def scaled(folder, pictures, channels):
    """Mean and std of the latents with the scale in the folder's config."""
    config = AutoencoderKL.load_config(folder)
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    model = tiny_model(vae_config={name: config[name] for name in names})
    model.vae.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())
    from mmar import MMARImageProcessor

    files = [file for file in sorted(pictures.iterdir()) if file.suffix == ".png" and file.stem != "broken"]
    processor = MMARImageProcessor(size=8)
    pixel_values = processor(processor.fetch_images([str(file) for file in files]), return_tensors="pt")
    mean, std = model.encode_image_distributions(pixel_values["pixel_values"])
    axes = (0, 2, 3) if channels else (0, 1, 2, 3)
    return mean.mean(axes), (mean.square() + std.square()).mean(axes).sub(mean.mean(axes).square()).sqrt()


@pytest.mark.parametrize("mode", ["scalar", "channel"])
def test_written_scale_gives_unit_variance(vae_folder, pictures, monkeypatch, capsys, mode):
    report = run(capsys, vae_folder, pictures / "files", "--mode", mode, "--image_size", 8)
    assert (report["pictures"], report["broken"], report["converged"]) == (60, 1, False)
    mean, std = scaled(vae_folder, pictures / "files", mode == "channel")
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-5, atol=0)
    assert not list(vae_folder.glob("*.unfinished"))


@pytest.mark.parametrize("source", ["parquet", "parquet/0.parquet"])
def test_parquet_gives_the_same_pictures(vae_folder, pictures, monkeypatch, capsys, source):
    options = ["--column", "picture", "--image_size", 8, "--dry_run"]
    before = (vae_folder / "config.json").read_bytes()
    report = run(capsys, vae_folder, pictures / source, *options)
    assert report["pictures"] == (60 if source == "parquet" else 30) and report["broken"] == 0
    assert (vae_folder / "config.json").read_bytes() == before
    if source == "parquet":
        of_files = run(capsys, vae_folder, pictures / "files", "--image_size", 8, "--dry_run")
        assert report["std"] == pytest.approx(of_files["std"], rel=1e-6)


def test_data_set_by_its_id(vae_folder, pictures, monkeypatch, capsys):
    """`datasets` opens ids; here it is handed the files that the id stands for."""
    import datasets

    load = datasets.load_dataset
    files = sorted(str(file) for file in (pictures / "parquet").iterdir())

    def load_dataset(name, **kwargs):
        assert name == "me/pictures" and kwargs == {"split": "validation", "streaming": True}
        return load("parquet", data_files={"validation": files}, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ["--column", "picture", "--split", "validation", "--image_size", 8]
    assert run(capsys, vae_folder, "me/pictures", *options)["pictures"] == 60


def test_stops_when_converged_or_told(vae_folder, tmp_path, monkeypatch, capsys):
    folder = make_pictures(tmp_path / "many", 200)
    report = run(capsys, vae_folder, folder, "--tolerance", 0.3, "--image_size", 8)
    assert report["converged"] and MIN_PICTURES <= report["pictures"] < 120
    assert report["standard_error"] < 0.3
    with pytest.raises(ValueError, match="`overwrite`"):
        run(capsys, vae_folder, folder, "--image_size", 8)
    report = run(capsys, vae_folder, folder, "--max_pictures", 21, "--image_size", 8, "--overwrite")
    assert report["pictures"] == 21 and not report["converged"]


@pytest.mark.parametrize(
    ("count", "options", "told", "not_told"),
    [
        (60, ["--tolerance", 0.5], ["60", str(MIN_PICTURES), "give more pictures"], ["tolerance"]),
        (80, ["--tolerance", 0.5, "--max_pictures", 20], ["20", str(MIN_PICTURES), "--max_pictures"], ["tolerance"]),
        (70, ["--tolerance", 1e-9], ["1e-09", "70", "give more pictures"], [str(MIN_PICTURES)]),
        (80, ["--tolerance", 1e-9, "--max_pictures", 70], ["1e-09", "--max_pictures"], [str(MIN_PICTURES)]),
    ],
)
def test_warning_names_what_kept_the_measurement_from_converging(
    vae_folder, tmp_path, monkeypatch, capsys, count, options, told, not_told
):
    pictures = make_pictures(tmp_path / "files", count)
    mmar("latent-scale", vae_folder, pictures, *options, "--image_size", "8", "--dry_run")
    captured = capsys.readouterr()
    warning = next(line for line in captured.err.splitlines() if line.startswith("warning: "))
    assert not json.loads(captured.out)["converged"]
    assert all(part in warning for part in told) and not any(part in warning for part in not_told)


@pytest.mark.parametrize("class_name", ["as saved", "MMARAutoencoderKL"])
def test_autoencoder_saved_from_a_model_is_a_plain_one(pictures, tmp_path, monkeypatch, capsys, class_name):
    tiny_model(vae_config={"scaling_factor": 1.0, "shift_factor": None}).vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    if class_name != "as saved":  # as earlier versions wrote it
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
    report = run(capsys, tmp_path / "vae", pictures / "files")
    assert load_vae(tmp_path / "vae")[0].config.scaling_factor == pytest.approx(1 / report["std_of_all"])


def test_autoencoder_by_reference_is_measured_and_the_config_of_the_model_changed(
    pictures, tmp_path, monkeypatch, capsys
):
    model = tiny_model(vae_config={"scaling_factor": 1.0, "shift_factor": None})
    model.vae.save_pretrained(tmp_path / "vae")
    model.config.frozen_parts = {"vae": {"repo_id": str(tmp_path / "vae")}}
    model.save_pretrained(tmp_path / "mmar", frozen="reference")
    before = (tmp_path / "vae" / "config.json").read_bytes()
    report = run(capsys, tmp_path / "mmar", pictures / "files")
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")
    assert loaded.vae.config.scaling_factor == pytest.approx(1 / report["std_of_all"])
    assert (tmp_path / "vae" / "config.json").read_bytes() == before


def test_systems_with_the_same_autoencoder_are_measured_and_others_refused(pictures, tmp_path, monkeypatch, capsys):
    from mmar.ablations.systems import system_config

    transfusion = system_config("transfusion", tiny_config(vae_config={"scaling_factor": 1.0, "shift_factor": None}))
    model_class_of(transfusion)(transfusion).save_pretrained(tmp_path / "transfusion")
    report = run(capsys, tmp_path / "transfusion", pictures / "files")
    config = json.loads((tmp_path / "transfusion" / "config.json").read_text())
    assert config["vae_config"]["scaling_factor"] == pytest.approx(1 / report["std_of_all"])
    own = {name: value for name, value in tiny_config().vae_config.items() if "factor" not in name}
    system_config("vq", tiny_config(), {**own, "vq_embed_dim": 4, "num_vq_embeddings": 16}).save_pretrained(
        tmp_path / "vq"
    )
    with pytest.raises(ValueError, match="mmar_vq"):
        load_vae(tmp_path / "vq")


def test_columns_that_only_the_rows_tell_are_found(pictures, tmp_path, monkeypatch):
    """Streams of several formats know their columns once a row was read."""
    import datasets

    rows = pq.read_table(pictures / "parquet" / "0.parquet").to_pylist()
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert len(list(iterate_pictures("me/pictures", column="picture"))) == 30
    with pytest.raises(ValueError, match="'image'"):
        next(iterate_pictures("me/pictures"))


def test_order_is_random_and_repeats():
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        folder = make_pictures(Path(name), 30)
        orders = [list(iterate_pictures(str(folder), seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]


def test_mmar_folder_is_changed_in_the_vae_config_alone(pictures, tmp_path, monkeypatch, capsys):
    model = tiny_model(vae_config={"scaling_factor": 1.0, "shift_factor": None})
    model.save_pretrained(tmp_path / "mmar")
    before = json.loads((tmp_path / "mmar" / "config.json").read_text())
    report = run(capsys, tmp_path / "mmar", pictures / "files")
    after = json.loads((tmp_path / "mmar" / "config.json").read_text())
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"vae_config"} and before.keys() == after.keys()
    assert after["vae_config"]["scaling_factor"] == pytest.approx(1 / report["std_of_all"])
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path / "mmar")
    assert loaded.vae.config.scaling_factor == after["vae_config"]["scaling_factor"]
    assert loaded.vae.config.shift_factor == after["vae_config"]["shift_factor"] == report["mean_of_all"]


def test_bad_input(vae_folder, pictures, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.eps").write_bytes(b"of a format that is not opened")
    cases = [
        (lambda: load_vae(tmp_path / "empty"), "no readable config.json"),
        (lambda: next(iterate_pictures(str(tmp_path / "empty"))), "expected pictures or parquet files"),
        (lambda: next(iterate_pictures(str(tmp_path / "no.parquet"))), "there is none at"),
        (lambda: next(iterate_pictures(str(pictures / "parquet"))), "must have a column 'image'; it has picture"),
        (lambda: measure(load_vae(vae_folder)[0], iter([b"no picture"]), 8), "none could be read, 1 were broken"),
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2"}')
    cases.append((lambda: load_vae(tmp_path / "other"), "is of a 'qwen2'"))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    cases.append((lambda: load_vae(tmp_path / "list"), "expected names and values in"))
    for case, message in (("missing", "safetensors missing"), ("cut", "truncated file"), ("other", "do not agree")):
        broken = tmp_path / f"{case} vae"
        shutil.copytree(vae_folder, broken)
        weights = broken / "diffusion_pytorch_model.safetensors"
        if case == "missing":
            weights.unlink()
        elif case == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            config = json.loads((broken / "config.json").read_text())
            (broken / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
        cases.append((lambda broken=broken: load_vae(broken), message))
    for size in (0, 7, -8):
        message = f"must be a multiple of 2.*got {size}"
        cases.append((lambda size=size: measure(load_vae(vae_folder)[0], iter([]), size), message))
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    vae = load_vae(vae_folder)[0]
    for parameter in vae.parameters():
        torch.nn.init.zeros_(parameter)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    vae.quant_conv.bias.data[4:] = -1000.0  # no noise of the posterior either
    # All channels, and one of them while the others do.
    for varying in ([], [0, 1, 2]):
        vae.quant_conv.bias.data[[4 + channel for channel in varying]] = 0.0
        with pytest.raises(ValueError, match="vary"):
            measure(vae, iter([buffer.getvalue()]), 8)


def test_rows_name_no_picture_outside_their_folder(pictures, tmp_path):
    folder, outside = tmp_path / "rows", tmp_path / "outside.png"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "own.png")
    Image.new("RGB", (8, 8)).save(outside)
    (folder / "link.png").symlink_to(outside)
    encoded = base64.b64encode(outside.read_bytes()).decode()
    paths = ["own.png", str(outside), "../outside.png", "link.png", "http://127.0.0.1:9/a.png", "/dev/zero", encoded]
    pq.write_table(pa.table({"image": paths}), folder / "rows.parquet")
    found = [
        None if isinstance(picture, str) and not os.path.isfile(picture) else picture
        for picture in iterate_pictures(str(folder / "rows.parquet"))
    ]
    assert sorted(found, key=str) == sorted([str(folder / "own.png"), outside.read_bytes(), *[None] * 5], key=str)
    found = list(iterate_pictures(str(folder)))
    assert sorted(found, key=str) == [str(folder / "own.png"), None]

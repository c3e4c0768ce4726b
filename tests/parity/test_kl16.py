"""KL-16 in CompVis' layout becomes diffusers' `AutoencoderKL` with the same numbers, or an error that says why not."""

import hashlib
import pickle
import sys
import types

import pytest
import torch
from commands import mmar
from diffusers import AutoencoderKL
from reference_compvis import (
    KL16_WIDTHS,
    ReferenceKL,
    distance,
    in_diffusion_model,
    with_lit_ema,
    with_random_vectors,
)
from safetensors.torch import load_file, save_file

from mmar.conversion.convert_kl16 import convert_kl16
from mmar.modeling_mmar.configuration_mmar import KL16_CONFIG


NARROW = [32, 64, 96]


def _reference(widths=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    return with_random_vectors(ReferenceKL(widths or NARROW, **kwargs))


def _assert_equal(folder, reference, size, tolerance=1e-4):
    vae = AutoencoderKL.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    with torch.no_grad():
        moments = reference.encode(pictures)
        posterior = vae.encode(pictures).latent_dist
        assert distance(posterior.parameters, moments) < tolerance
        z = torch.randn(posterior.mean.shape, generator=generator)
        assert distance(vae.decode(z).sample, reference.decode(z)) < tolerance
    return vae


@pytest.mark.parametrize(
    ("decoder_attention", "variant", "parameters"), [(True, "LDM", 69_610_963), (False, "MAR", 66_456_019)]
)
def test_full_width(tmp_path, decoder_attention, variant, parameters):
    reference = _reference(KL16_WIDTHS, decoder_attention=decoder_attention)
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "model.ckpt")
    report = convert_kl16(tmp_path / "model.ckpt", tmp_path / "vae")
    assert report["variant"] == variant
    assert report["parameters"] == parameters == sum(p.numel() for p in reference.parameters())
    vae = _assert_equal(tmp_path / "vae", reference, 48)
    if decoder_attention:
        assert {name: vae.config[name] for name in KL16_CONFIG} == KL16_CONFIG


def _lightning(reference, monkeypatch):
    """What Lightning writes: the weights, the losses', and a class as a key of a dict."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3)}
    return {
        "epoch": 3,
        "callbacks": {module.ModelCheckpoint: {"best_model_path": "a"}},
        "state_dict": {**reference.state_dict(), **loss},
    }


@pytest.mark.parametrize("layout", ["plain", "model", "lightning", "first_stage", "teacher", "ema", "ema_entry"])
def test_layouts(tmp_path, monkeypatch, layout):
    reference = _reference(decoder_attention=layout != "model")
    state = reference.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    saved = {
        "plain": lambda: state,
        "model": lambda: {"model": state},
        "lightning": lambda: _lightning(reference, monkeypatch),
        "first_stage": lambda: {"state_dict": in_diffusion_model(state)},
        # Next to another one, whose names are longer.
        "teacher": lambda: in_diffusion_model(state) | {f"teacher.first_stage_model.{n}": zeros[n] for n in zeros},
        "ema": lambda: {"state_dict": with_lit_ema(state)},
        "ema_entry": lambda: {"model": zeros, "model_ema": state},
    }[layout]()
    torch.save(saved, tmp_path / "model.pt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    convert_kl16(tmp_path / "model.pt", tmp_path / "vae")
    _assert_equal(tmp_path / "vae", reference, 16)


@pytest.mark.parametrize("layout", ["ema", "ema_entry"])
def test_without_ema(tmp_path, layout):
    state = _reference().state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    saved = {"state_dict": with_lit_ema(state)} if layout == "ema" else {"model": zeros, "model_ema": state}
    torch.save(saved, tmp_path / "model.ckpt")
    convert_kl16(tmp_path / "model.ckpt", tmp_path / "vae", use_ema=False)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(not parameter.any() for parameter in vae.parameters())


def test_half_precision_becomes_float32(tmp_path):
    state = {name: tensor.half() for name, tensor in _reference().state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    convert_kl16(tmp_path / "model.pt", tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_command(tmp_path, capsys):
    reference = _reference()
    file = tmp_path / "model.safetensors"
    save_file(reference.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    mmar("convert", "kl16", file, tmp_path / "vae", "--sha256", digest.upper())
    assert digest in capsys.readouterr().out
    _assert_equal(tmp_path / "vae", reference, 16)


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def _broken(case, folder):
    state = _reference().state_dict()
    file = folder / "model.ckpt"
    if case == "missing file":
        return folder / "nothing.ckpt"
    if case == "folder":
        return folder
    if case == "code":
        torch.save({"state_dict": state, "extra": _Code()}, file)
    elif case == "old pickle":
        file.write_bytes(pickle.dumps(_Code()))
    elif case == "truncated":
        torch.save(state, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif case == "truncated safetensors":
        file = folder / "model.safetensors"
        save_file(state, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif case == "text":
        file.write_text("not a checkpoint")
    elif case == "missing tensor":
        torch.save({name: state[name] for name in state if name != "decoder.up.1.block.0.conv2.bias"}, file)
    elif case == "left over":
        torch.save(state | {"encoder.extra.weight": torch.zeros(1)}, file)
    elif case == "wrong shape":
        torch.save(state | {"encoder.mid.block_1.conv1.weight": torch.zeros(96, 96, 1, 1)}, file)
    elif case == "half an average":
        saved = with_lit_ema(state)
        del saved["model_ema.quant_convbias"]
        torch.save(saved, file)
    elif case == "vq":
        torch.save(state | {"quantize.embedding.weight": torch.zeros(4, 4)}, file)
    elif case == "diffusers":
        torch.save({f"encoder.down_blocks.0.{i}": torch.zeros(1) for i in range(3)}, file)
    elif case == "language model":
        torch.save({f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1) for i in range(20)}, file)
    elif case == "numbers":
        torch.save({1: torch.zeros(1)}, file)
    elif case == "list":
        torch.save([torch.zeros(1)], file)
    return file


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing file", "there is none at"),
        ("folder", "is a folder"),
        ("code", "holds code, which was not run"),
        ("old pickle", "holds code, which was not run"),
        ("truncated", "model.ckpt.*Download it again"),
        ("truncated safetensors", "broken or truncated"),
        ("text", "model.ckpt.*Download it again"),
        ("missing tensor", r"missing: decoder\.up\.1\.block\.0\.conv2\.bias; left over: nothing"),
        ("left over", r"missing: nothing; left over: encoder\.extra\.weight"),
        ("wrong shape", r"encoder\.mid\.block_1\.conv1\.weight of shape \(96, 96, 3, 3\)"),
        ("half an average", "moving average.*missing: quant_convbias"),
        ("vq", "got a VQ autoencoder.*take LDM's kl-f16.*mmar convert vq16"),
        ("diffusers", "diffusers' layout"),
        ("language model", "got model.layers.*and 12 more"),
        ("numbers", "expected a KL autoencoder in CompVis' layout.*got 1"),
        ("list", "expected a dict of tensors"),
    ],
)
def test_errors(tmp_path, capsys, case, message):
    file = _broken(case, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_kl16(file, tmp_path / "vae")
    assert sorted(tmp_path.iterdir()) == before
    assert "this must not run" not in capsys.readouterr().out


def test_wrong_hash_and_full_folder(tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save(_reference().state_dict(), file)
    with pytest.raises(ValueError, match="SHA-256 00"):
        convert_kl16(file, tmp_path / "vae", sha256="00")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_kl16(file, tmp_path / "vae")
    assert [path.name for path in (tmp_path / "vae").iterdir()] == ["notes.txt"]


def test_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "model.ckpt"
    torch.save(_reference().state_dict(), file)

    def fail(self, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", fail)
    with pytest.raises(ValueError, match="disk"):
        convert_kl16(file, tmp_path / "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]
    monkeypatch.undo()
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("mmar.conversion.folders.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="0.0 GB"):
        convert_kl16(file, tmp_path / "vae")

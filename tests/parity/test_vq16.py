"""VQ-16 in CompVis' layout becomes diffusers' `VQModel` with the same codes and pictures, and MMAR's tokenizer."""

import hashlib

import pytest
import torch
from commands import mmar
from diffusers import VQModel
from helpers import seeded, tiny_arguments
from reference_compvis import (
    KL16_WIDTHS,
    ReferenceKL,
    ReferenceVQ,
    distance,
    in_diffusion_model,
    with_lit_ema,
    with_random_vectors,
)
from safetensors.torch import save_file

from mmar.ablations.modeling_vq_mmar import VQ16_CONFIG, MMARVQConfig, MMARVQForConditionalGeneration
from mmar.conversion.compvis import convert_weights
from mmar.conversion.convert_vq16 import autoencoder_config, convert_vq16


# Three levels, and a code narrower than what the decoder reads, so that no size stands for another.
NARROW = {"widths": [32, 64, 96], "z_channels": 8, "code_channels": 6, "num_codes": 50}
SIZE = 32


def _reference():
    torch.manual_seed(0)
    reference = with_random_vectors(ReferenceVQ(**NARROW))
    with torch.no_grad():
        # Of mean 0 and variance 1, as the entries of the codebook are, so that a picture has many codes.
        encoded = reference.encode(_pictures(4))
        mean, std = encoded.mean((0, 2, 3)), encoded.std((0, 2, 3))
        reference.quant_conv.weight.div_(std[:, None, None, None])
        reference.quant_conv.bias.sub_(mean).div_(std)
    return reference


def _pictures(num=2):
    return torch.rand(num, 3, SIZE, SIZE, generator=seeded(1)) * 2 - 1


@torch.no_grad()
def _assert_equal(folder, reference):
    """In float64, where only rounding is left: such random networks round by 2e-5 in float32."""
    vq, reference, pictures = VQModel.from_pretrained(folder).double(), reference.double(), _pictures().double()
    expected = reference.encode(pictures)
    encoded = vq.encode(pictures).latents
    assert distance(encoded, expected) < 1e-10
    codes = reference.codes(expected)
    assert torch.equal(vq.quantize(encoded)[2][2].view_as(codes), codes)
    assert len(codes.unique()) > 10
    assert distance(vq.decode(encoded).sample, reference.decode(codes)) < 1e-10


def test_the_published_size():
    """On the meta device: what is read of LDM's vq-f16 is the ablation's default, and each tensor has its place."""
    with torch.device("meta"):
        reference = ReferenceVQ(KL16_WIDTHS)
    state = reference.state_dict()
    config = autoencoder_config(state)
    assert config == VQ16_CONFIG
    vq = convert_weights(state, config, VQModel)
    assert sum(p.numel() for p in vq.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("layout", ["plain", "lightning", "first_stage", "ema"])
def test_layouts(tmp_path, layout):
    reference = _reference()
    state = reference.state_dict()
    saved = {
        "plain": lambda: state,
        "lightning": lambda: {"epoch": 3, "state_dict": state | {"loss.discriminator.main.0.weight": torch.zeros(3)}},
        "first_stage": lambda: {"state_dict": in_diffusion_model(state)},
        "ema": lambda: {"state_dict": with_lit_ema(state)},
    }[layout]()
    torch.save(saved, tmp_path / "model.ckpt")
    report = convert_vq16(tmp_path / "model.ckpt", tmp_path / "vq")
    assert report["parameters"] == sum(p.numel() for p in reference.parameters())
    _assert_equal(tmp_path / "vq", reference)


def test_without_ema(tmp_path):
    torch.save({"state_dict": with_lit_ema(_reference().state_dict())}, tmp_path / "model.ckpt")
    convert_vq16(tmp_path / "model.ckpt", tmp_path / "vq", use_ema=False)
    assert all(not parameter.any() for parameter in VQModel.from_pretrained(tmp_path / "vq").parameters())


def test_command(tmp_path, capsys):
    reference, file = _reference(), tmp_path / "model.safetensors"
    save_file(reference.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    mmar("convert", "vq16", file, tmp_path / "vq", "--sha256", digest)
    assert digest in capsys.readouterr().out
    _assert_equal(tmp_path / "vq", reference)
    with pytest.raises(ValueError, match="SHA-256 00"):
        convert_vq16(file, tmp_path / "again", sha256="00")
    assert not (tmp_path / "again").exists()


def _without(state, *names):
    assert all(name in state for name in names)
    return {name: tensor for name, tensor in state.items() if name not in names}


def _average_without_codebook(state):
    return _without(with_lit_ema(state), "model_ema.quantizeembeddingweight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: _without(state, "decoder.up.1.block.0.conv2.bias"),
            r"exactly once; missing: decoder\.up\.1\.block\.0\.conv2\.bias; left over: nothing",
        ),
        (
            # Attention at the smallest level, which tells its kind of block, is whole or not there.
            lambda state: _without(state, "encoder.down.2.attn.0.q.weight"),
            r"exactly once; missing: encoder\.down\.2\.attn\.0\.q\.weight; left over: nothing",
        ),
        (
            lambda state: state | {"quantize.used": torch.zeros(9)},
            r"exactly once; missing: nothing; left over: quantize\.used",
        ),
        (
            lambda state: state | {"quantize.embedding.weight": torch.zeros(50, 5)},
            r"expected quantize\.embedding\.weight of shape \(50, 6\), as the other tensors have it; got \(50, 5\)",
        ),
        (
            lambda state: state | {"encoder.mid.block_1.conv1.weight": torch.zeros(96, 96, 1, 1)},
            r"expected encoder\.mid\.block_1\.conv1\.weight of shape \(96, 96, 3, 3\)",
        ),
        (
            lambda state: _without(state, "quantize.embedding.weight"),
            r"expected the whole autoencoder in the checkpoint; quantize\.embedding\.weight missing",
        ),
        (
            lambda state: _without(state, "quant_conv.weight"),
            r"expected the whole autoencoder in the checkpoint; quant_conv\.weight missing",
        ),
        (
            lambda state: _without(state, "decoder.conv_in.weight"),
            r"expected the whole autoencoder in the checkpoint; decoder\.conv_in\.weight missing",
        ),
        (
            lambda state: (
                _without(state, "quantize.embedding.weight")
                | {"quantize.embed.weight": torch.zeros(50, 6), "quantize.proj.bias": torch.zeros(50)}
            ),
            r"got a quantizer without quantize\.embedding\.weight \(quantize\.embed\.weight, quantize\.proj\.bias\)",
        ),
        (
            _average_without_codebook,
            r"moving average.*missing: quantizeembeddingweight; left over: nothing",
        ),
        (
            lambda state: ReferenceKL(NARROW["widths"]).state_dict(),
            "`mmar convert kl16`",
        ),
        (
            # MAR's kind: the decoder has no attention.
            lambda state: in_diffusion_model(ReferenceKL(NARROW["widths"], decoder_attention=False).state_dict()),
            "`mmar convert kl16`",
        ),
        (
            lambda state: {f"encoder.down_blocks.0.{i}": torch.zeros(1) for i in range(3)},
            "expected a VQ autoencoder.*diffusers' layout. It needs no conversion",
        ),
        (
            lambda state: {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1) for i in range(20)},
            "expected a VQ autoencoder.*got model.layers.*and 12 more. Take LDM's vq-f16.",
        ),
    ],
    ids=[
        "one tensor less",
        "attention not whole",
        "one tensor more",
        "another width of the codebook",
        "another shape",
        "no codebook",
        "no quant_conv",
        "no first layer of the decoder",
        "another quantizer",
        "average without the codebook",
        "KL of LDM",
        "KL of MAR in a diffusion model",
        "diffusers",
        "language model",
    ],
)
def test_errors(tmp_path, change, message):
    torch.save(change(_reference().state_dict()), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_vq16(tmp_path / "model.ckpt", tmp_path / "vq")
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@torch.no_grad()
def test_as_the_tokenizer_of_mmar(tmp_path):
    reference = _reference()
    torch.save(reference.state_dict(), tmp_path / "model.ckpt")
    convert_vq16(tmp_path / "model.ckpt", tmp_path / "vq")
    vq = VQModel.from_pretrained(tmp_path / "vq")
    vae_config = {name: value for name, value in vq.config.items() if not name.startswith("_")}
    config = MMARVQConfig(**tiny_arguments() | {"vae_config": vae_config, "image_size": SIZE})
    assert (config.num_latents, config.latent_channels, config.num_codes) == (64, 6, 50)
    model = MMARVQForConditionalGeneration(config).eval()
    model.vae.load_state_dict(vq.state_dict())
    pictures = _pictures()
    latents = model.encode_images(pictures)
    codes = model.codes_of(latents.permute(0, 2, 3, 1))
    assert torch.equal(codes, reference.codes(reference.encode(pictures)))
    # In float32 what is decoded differs by a rounding: VQModel adds the way to the entry to what it encoded.
    assert distance(model.decode_latents(latents), vq(pictures).sample) < 1e-4
    entries = vq.quantize.embedding(codes).permute(0, 3, 1, 2)
    assert distance(model.decode_latents(latents), vq.decode(entries, force_not_quantize=True).sample) < 1e-6

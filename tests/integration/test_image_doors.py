"""Every door takes what another takes: forms of an image against doors, and doors of a model against each other."""

import base64
import io

import numpy as np
import pytest
import torch
from conftest import REPO
from helpers import seeded, tiny_config
from PIL import Image
from squares import make_processor
from transformers import AutoModel, pipeline

from mmar import MMARForConditionalGeneration, MMARPipeline
from mmar.training.rows import BadRow, make_row
from mmar.training.samples import SampleMaker


ARRAY = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
buffer = io.BytesIO()
Image.fromarray(ARRAY).save(buffer, "PNG")
CONTENT = buffer.getvalue()
TEXT = base64.b64encode(CONTENT).decode()
FORMS = {
    "PIL": lambda: Image.fromarray(ARRAY),
    "bytes": lambda: CONTENT,
    "bytes and path": lambda: {"bytes": CONTENT, "path": "a.png"},
    "base64": lambda: TEXT,
    "data URI": lambda: f"data:image/png;base64,{TEXT}",
    "array": lambda: ARRAY,
    "tensor": lambda: torch.from_numpy(ARRAY),
    "file object": lambda: io.BytesIO(CONTENT),
}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def in_call(processor, image):
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]


def in_chat(processor, image, key="image"):
    messages = [{"role": "user", "content": [{"type": "image", key: image}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options)["pixel_values"]


def in_row(processor, image):
    maker = SampleMaker(processor, tiny_config().num_latents)
    return maker(make_row({"image": image, "text": "a"}, {}, "/nowhere", "row"), "t2i", seeded(0))["pixel_values"]


DOORS = {
    "image processor": lambda processor, image: processor.image_processor(image, return_tensors="pt")["pixel_values"],
    "processor": in_call,
    "chat": in_chat,
    "chat by URL": lambda processor, image: in_chat(processor, image, "url"),
    "training row": in_row,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_equal_at_all_doors(processor, door, form):
    expected = torch.from_numpy(ARRAY).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.equal(DOORS[door](processor, FORMS[form]()), expected)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["path", "URI"])
def test_places_are_the_callers(processor, tmp_path, door, kind):
    path = tmp_path / "a.png"
    path.write_bytes(CONTENT)
    place = str(path) if kind == "path" else path.as_uri()
    if door == "training row":
        with pytest.raises(BadRow):
            DOORS[door](processor, place)
    else:
        assert DOORS[door](processor, place).shape == (1, 3, 8, 8)


@torch.no_grad()
def test_an_adapter_opens_as_a_model(hub_root, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = MMARForConditionalGeneration.from_pretrained(hub_root / REPO)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted(input_ids=ids).logits
    for opener in (AutoModel, MMARForConditionalGeneration):
        torch.testing.assert_close(opener.from_pretrained(tmp_path).eval()(input_ids=ids).logits, expected)
    plain = MMARForConditionalGeneration.from_pretrained(hub_root / REPO)
    assert not torch.allclose(plain(input_ids=ids).logits, expected)


def test_balanced_device_map(hub_root):
    steps = {"num_ar_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
    images = [
        MMARPipeline.from_pretrained(hub_root / REPO, **options)("a red square", generator=seeded(0), **steps).images
        for options in ({}, {"device_map": "balanced"})
    ]
    assert torch.equal(images[0].cpu(), images[1].cpu())


def test_images_per_prompt_of_both_pipelines(hub_root):
    steps = {"num_ar_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
    drawer, pipe = pipeline("text-to-image", model=str(hub_root / REPO)), MMARPipeline.from_pretrained(hub_root / REPO)
    expected = pipe("a red square", generator=seeded(0), num_images_per_prompt=2, **steps).images
    assert torch.equal(drawer("a red square", generator=seeded(0), num_images_per_prompt=2, **steps), expected)
    images = drawer(["a", "b", "c"], num_images_per_prompt=2, batch_size=2, **steps)
    assert [tuple(own.shape) for own in images] == [tuple(expected.shape)] * 3
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_images_per_prompt"):
            drawer("a", num_images_per_prompt=count)

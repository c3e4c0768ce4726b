"""Every door takes what another takes: forms of an image against doors, and doors of a model against each other."""

import base64
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO
from helpers import seeded, tiny_config
from PIL import Image
from squares import make_processor
from transformers import AutoModel, pipeline

from mmar import MMARForConditionalGeneration, MMARPipeline
from mmar.ablations import fashion
from mmar.conversion.measure_latent_scale import iterate_pictures
from mmar.evaluation import answers, dpg, emoji_styles, fid
from mmar.evaluation.vlmevalkit_data import chat_content
from mmar.processors import image_processing_mmar
from mmar.training.rows import make_row
from mmar.training.samples import SampleMaker
from mmar.training.train_vae import read_pictures


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
# Forms that text holds, and that a parquet file holds.
TEXTS = ("base64", "data URI")
CELLS = ("bytes", "bytes and path", *TEXTS)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def in_call(processor, image):
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]


def in_chat(processor, image, key="image"):
    messages = [{"role": "user", "content": [{"type": "image", key: image}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options)["pixel_values"]


def in_row(processor, image, folder="/nowhere"):
    maker = SampleMaker(processor, tiny_config().num_latents)
    return maker(make_row({"image": image, "text": "a"}, {}, folder, "row"), "t2i", seeded(0))["pixel_values"]


def in_parquet(tmp_path, image):
    pq.write_table(pa.table({"image": pa.array([image]), "label": ["a"]}), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def in_vae_training(processor, image, tmp_path):
    return read_pictures(in_parquet(tmp_path, image), 8)[1].float() / 127.5 - 1


def in_latent_scale(processor, image, tmp_path):
    (picture,) = iterate_pictures(str(in_parquet(tmp_path, image)))
    return in_image_processor(processor, processor.image_processor.fetch_images([picture]))


def in_emoji_scores(processor, image, monkeypatch):
    asked = []
    monkeypatch.setattr(emoji_styles, "ask", lambda pipe, pictures, question: asked.extend(pictures) or ["a"])
    questions = list(emoji_styles.QUESTIONS.values())
    row = {"image": image, "questions": questions, "answers": ["a"] * len(questions), "sibling_in_train": True}
    emoji_styles.score_captions(SimpleNamespace(processor=processor), [row])
    return in_image_processor(processor, asked[0])


def in_vlmevalkit(processor, image):
    return in_content(processor, chat_content([{"type": "image", "value": image}]))


def in_content(processor, content):
    answerer = SimpleNamespace(processor=processor, model=SimpleNamespace(device="cpu"))
    return answers.MMARAnswerer.features(answerer, [[{"role": "user", "content": content}]])["pixel_values"]


@pytest.fixture
def lmms_plugin(monkeypatch):
    """The plugin of lmms-eval without the kit, of which it needs names alone here."""
    names = {"instance": ("GenerationResult", "Instance"), "model": ("lmms",), "task": ("ConfigurableTask",)}
    for module, classes in names.items():
        fake = ModuleType(f"lmms_eval.api.{module}")
        vars(fake).update({name: type(name, (), {}) for name in classes})
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.api", ModuleType("lmms_eval.api"))
    path = Path(emoji_styles.__file__).with_name("lmms_eval_plugin.py")
    spec = importlib.util.spec_from_file_location("mmar.evaluation.lmms_eval_plugin_alone", path)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin


def in_lmms_eval(processor, image, lmms_plugin):
    return in_content(processor, lmms_plugin.content_of("Which?", [image]))


def in_lmms_eval_chat(processor, image, lmms_plugin):
    messages = [{"role": "user", "content": [{"type": "image", "url": image}]}]
    return in_content(processor, lmms_plugin.MMARChatForLMMSEval._chat(None, messages)[0]["content"])


def in_image_processor(processor, image):
    return processor.image_processor(image, return_tensors="pt")["pixel_values"]


# Doors through which a caller names an image.
CALLERS = {
    "image processor": in_image_processor,
    "processor": in_call,
    "chat": in_chat,
    "chat by URL": lambda processor, image: in_chat(processor, image, "url"),
}
# Doors through which data does, and what it can hold.
DATA = {
    "training row": (in_row, tuple(FORMS)),
    "VAE training": (in_vae_training, CELLS),
    "latent scale": (in_latent_scale, CELLS),
    "emoji scores": (in_emoji_scores, tuple(FORMS)),
    "VLMEvalKit": (in_vlmevalkit, TEXTS),
    "lmms-eval": (in_lmms_eval, tuple(FORMS)),
    "lmms-eval chat": (in_lmms_eval_chat, tuple(FORMS)),
}


@pytest.fixture
def doors(tmp_path, monkeypatch, lmms_plugin):
    """Each with the fixtures that it asks for by name."""
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "lmms_plugin": lmms_plugin}

    def enter(door, *arguments):
        function = CALLERS[door] if door in CALLERS else DATA[door][0]
        names = function.__code__.co_varnames[2 : function.__code__.co_argcount]
        return function(*arguments, *(given[name] for name in names if name in given))

    return enter


ALL = [(door, form) for door in CALLERS for form in FORMS] + [
    (d, form) for d, (_, forms) in DATA.items() for form in forms
]


@pytest.mark.parametrize(("door", "form"), ALL)
def test_forms_are_equal_at_all_doors(processor, doors, door, form):
    expected = torch.from_numpy(ARRAY).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.equal(doors(door, processor, FORMS[form]()), expected)


@pytest.mark.parametrize("door", [*CALLERS, *DATA])
@pytest.mark.parametrize("kind", ["path", "URI", "URL"])
def test_places_are_the_callers(processor, doors, tmp_path_factory, monkeypatch, door, kind):
    path = tmp_path_factory.mktemp("elsewhere") / "a.png"
    path.write_bytes(CONTENT)
    place = {"path": str(path), "URI": path.as_uri(), "URL": "http://127.0.0.1:9/a.png"}[kind]
    downloaded = []
    monkeypatch.setattr(image_processing_mmar, "_download", lambda url, name: downloaded.append(url) or CONTENT)
    if door in CALLERS:
        assert doors(door, processor, place).shape == (1, 3, 8, 8)
    else:
        with pytest.raises(ValueError):
            doors(door, processor, place)
    assert len(downloaded) == (door in CALLERS and kind == "URL")


def file_in_row(processor, path):
    return in_row(processor, path.name, path.parent)


def file_in_vae_training(processor, path):
    return in_vae_training(processor, path.name, path.parent)


def file_in_latent_scale(processor, path):
    (picture,) = iterate_pictures(str(in_parquet(path.parent, path.name)))
    return in_image_processor(processor, processor.image_processor.fetch_images([picture]))


def file_in_fid(processor, path):
    square = fid.SquarePictures([path], 8)[0]
    if isinstance(square, str):
        raise ValueError(square)
    return square[None].float() / 127.5 - 1


def file_in_dpg(processor, path):
    return in_image_processor(processor, dpg.make_grid([path] * 4).crop((8, 8, 16, 16)))


def file_in_vlmevalkit(processor, path):
    return in_content(processor, chat_content([{"type": "image", "value": str(path)}], [path.parent]))


# Doors through which files come: of a folder that a caller names, or named by rows within their own folder.
FILES = {
    **{door: lambda processor, path, door=door: CALLERS[door](processor, str(path)) for door in CALLERS},
    "training row": file_in_row,
    "VAE training": file_in_vae_training,
    "latent scale": file_in_latent_scale,
    "FID": file_in_fid,
    "DPG-Bench": file_in_dpg,
    "VLMEvalKit": file_in_vlmevalkit,
}


def sideways(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(ARRAY).copy()).save(path, "PNG", exif=exif)


def transparent(path):
    opacity = np.full((8, 8, 1), 255, np.uint8)
    opacity[:4] = 0
    Image.fromarray(np.concatenate([ARRAY, opacity], -1)).save(path, "PNG")


def over_white():
    return np.concatenate([np.full_like(ARRAY[:4], 255), ARRAY[4:]])


def deep(path):
    Image.fromarray(ARRAY[..., 0].astype(np.uint16) * 257).save(path, "PNG")


GOOD = {
    "sideways": (sideways, lambda: ARRAY),
    "transparent": (transparent, over_white),
    "16 bits": (deep, lambda: ARRAY[..., :1].repeat(3, -1)),
}
BAD = {
    "EPS": lambda path: Image.fromarray(ARRAY).save(path, "EPS"),
    "truncated": lambda path: path.write_bytes(CONTENT[: len(CONTENT) // 2]),
    "too large": lambda path: path.write_bytes(CONTENT + bytes(1000)),
    "too many pixels": lambda path: Image.new("L", (400, 400)).save(path, "PNG"),
}


@pytest.mark.parametrize("door", FILES)
@pytest.mark.parametrize("kind", [*GOOD, *BAD])
def test_one_reader_opens_the_files_of_all_doors(processor, tmp_path, monkeypatch, door, kind):
    path = tmp_path / "a.png"
    if kind in GOOD:
        write, expected = GOOD[kind]
        write(path)
        expected = torch.from_numpy(expected()).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert torch.equal(FILES[door](processor, path), expected)
        return
    BAD[kind](path)
    if kind == "too large":
        monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_BYTES", len(CONTENT) + 999)
    if kind == "too many pixels":
        monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError):
        FILES[door](processor, path)


def test_no_door_opens_files_by_itself():
    root = Path(emoji_styles.__file__).parents[1]
    folders = ("ablations", "benchmarks", "conversion", "evaluation", "modeling_mmar", "pipelines", "training")
    code = {path.name: path.read_text() for folder in folders for path in (root / folder).glob("*.py")}
    opening = ("Image.open(", "load_image(", "imread(", "read_file(", "decode_image(")
    assert len(code) > 50 and not [name for name, text in code.items() if any(call in text for call in opening)]


def test_scores_of_drawings_read_no_file_outside_of_their_folder(tmp_path):
    (tmp_path / "drawn").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "outside.png")
    fashion.save_file(fashion.FashionJudge(1).state_dict(), tmp_path / "judge.safetensors")
    (tmp_path / "judge.json").write_text('["a"]')
    for file in ("../outside.png", str(tmp_path / "outside.png"), (tmp_path / "outside.png").as_uri()):
        line = f'{{"file": "{file}", "label": "a", "style": "dark"}}'
        (tmp_path / "drawn" / "captions.jsonl").write_text(line)
        with pytest.raises(ValueError, match="file"):
            fashion.score(tmp_path / "drawn", tmp_path / "judge.safetensors", tmp_path / "none.parquet")


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

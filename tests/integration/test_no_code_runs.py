"""
Files of strangers run no code: pickles wherever weights, states or caches are read, and Python that a config names.

Pickles in a checkpoint of LDM or MAR (tests/parity/test_kl16.py, test_vq16.py), of Inception and its statistics
(tests/unit/test_fid_input.py), and YAML tags (tests/unit/test_recipes.py) are tested where they are read.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from commands import mmar
from diffusers import DiffusionPipeline
from parts import make_preset, make_qwen2, make_vae
from peft import LoraConfig, get_peft_model
from squares import make_processor, make_rows, make_squares_model, make_trainer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from mmar import MMARForConditionalGeneration, MMARPipeline, MMARProcessor
from mmar.conversion.init_from_qwen2 import init_from_qwen2
from mmar.conversion.models import open_model, open_pipeline, open_processor
from mmar.conversion.plora_peft import export_plora, import_plora
from mmar.training import train_vae
from mmar.training.latents import LatentCache, cache_latents


CANARY = "canary"


class Malicious:
    """What a pickle can do: make a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lora_of(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders of every kind that is opened, as MMAR, transformers, diffusers and peft write them."""
    root = tmp_path_factory.mktemp("originals")
    processor = make_processor()
    model = make_squares_model(processor)
    MMARPipeline(model, processor, model.default_scheduler()).save_pretrained(root / "mmar")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(root / "run", processor, **options).train()
    make_trainer(root / "adapted", processor, lora_of(make_squares_model(processor)), **options).train()
    for checkpoint in root.glob("*/checkpoint-1"):
        (checkpoint / "manifest.json").unlink()  # which holds the sizes of the files
    lora_of(MMARForConditionalGeneration.from_pretrained(root / "mmar")).save_pretrained(root / "lora")
    export_plora(model, root / "plora")
    cache_latents(make_rows(), model, processor, root / "latents")
    make_qwen2(root / "qwen2")
    make_vae(root / "vae")
    make_preset(root / "preset")
    return root


@pytest.fixture
def folders(originals, tmp_path, monkeypatch):
    """Copies of them, which a test may change; remote code would be kept there too."""
    shutil.copytree(originals, tmp_path / "folders")
    config = tmp_path / "folders" / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(originals), str(tmp_path / "folders")))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "folders"


def run(module, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()


def resume(folders, name, model=None):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folders / name, make_processor(), model, **options)
    trainer.train(resume_from_checkpoint=str(folders / name / "checkpoint-1"))


def resume_adapted(folders):
    resume(folders, "adapted", lora_of(make_squares_model(make_processor())))


def init(folders):
    parts = {"backbone": str(folders / "qwen2"), "vae": folders / "vae", "preset": str(folders / "preset")}
    init_from_qwen2(**parts, out=folders / "out")


def go_on_with_vae(folders):
    data = ["--data", "none", "--start", folders / "vae", "--out", folders / "out"]
    run(train_vae, "--config", folders / "mmar", *data)


MMAR_DOORS = {
    "model": lambda folders: MMARForConditionalGeneration.from_pretrained(folders / "mmar"),
    "AutoModel": lambda folders: AutoModel.from_pretrained(folders / "mmar"),
    "text-to-image": lambda folders: pipeline("text-to-image", model=str(folders / "mmar")),
    "image-text-to-text": lambda folders: pipeline("image-text-to-text", model=str(folders / "mmar")),
    "open_model": lambda folders: open_model(folders / "mmar"),
    "open_pipeline": lambda folders: open_pipeline(folders / "mmar"),
    "export": lambda folders: mmar("export", folders / "mmar", folders / "exported"),
}
LORA_DOORS = {
    "lora, AutoModel": lambda folders: AutoModel.from_pretrained(folders / "lora"),
    "lora, model": lambda folders: MMARForConditionalGeneration.from_pretrained(folders / "lora"),
}
INIT_DOORS = {"init_from_qwen2": init}
VAE_DOORS = {
    **INIT_DOORS,
    "measure_latent_scale": lambda folders: mmar("latent-scale", folders / "vae", folders),
    "train_vae": go_on_with_vae,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("file", "in_place_of", "doors"),
    [
        ("mmar/pytorch_model.bin", "mmar/model.safetensors", MMAR_DOORS),
        ("mmar/model.safetensors", None, MMAR_DOORS),
        ("lora/adapter_model.bin", "lora/adapter_model.safetensors", LORA_DOORS),
        ("run/checkpoint-1/optimizer.pt", None, {"resume": lambda folders: resume(folders, "run")}),
        ("run/checkpoint-1/scheduler.pt", None, {"resume": lambda folders: resume(folders, "run")}),
        ("run/checkpoint-1/rng_state.pth", None, {"resume": lambda folders: resume(folders, "run")}),
        ("run/checkpoint-1/ema.safetensors", None, {"resume": lambda folders: resume(folders, "run")}),
        (
            "run/checkpoint-1/pytorch_model.bin",
            "run/checkpoint-1/model.safetensors",
            {"resume": lambda folders: resume(folders, "run")},
        ),
        (
            "adapted/checkpoint-1/adapter_model.bin",
            "adapted/checkpoint-1/adapter_model.safetensors",
            {"resume": resume_adapted},
        ),
        ("qwen2/pytorch_model.bin", "qwen2/model.safetensors", INIT_DOORS),
        ("vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors", VAE_DOORS),
        (
            "plora/adapter_model.bin",
            "plora/adapter_model.safetensors",
            {"import": lambda folders: import_plora(open_model(folders / "mmar"), folders / "plora")},
        ),
        (
            "latents/latents-00000-of-00001.safetensors",
            None,
            {"read": lambda folders: LatentCache(folders / "latents")[0]},
        ),
    ],
)
def test_a_pickle_is_refused_and_not_run(folders, tmp_path, file, in_place_of, doors, legacy):
    (folders / (in_place_of or file)).unlink()
    torch.save(Malicious(tmp_path / CANARY), folders / file, _use_new_zipfile_serialization=not legacy)
    for name, door in doors.items():
        with pytest.raises(Exception) as told:  # noqa: B017
            door(folders)
        print(name, repr(told.value)[:300])
        assert not (tmp_path / CANARY).exists(), name
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO((folders / file).read_bytes()), weights_only=False)
    assert (tmp_path / CANARY).exists()


def test_arguments_of_a_training_are_not_unpickled(folders, tmp_path):
    """transformers writes them into checkpoints; nothing reads them."""
    arguments = folders / "run" / "checkpoint-1" / "training_args.bin"
    arguments.write_bytes(pickle.dumps(Malicious(tmp_path / CANARY)))
    resume(folders, "run")
    assert not (tmp_path / CANARY).exists()


PYTHON = """
import os
os.path.exists({canary!r}) or os.mkdir({canary!r})

class Evil:
    def __init__(self, *args, **kwargs): pass
    from_pretrained = from_config = classmethod(lambda cls, *args, **kwargs: cls())

def generate(*args, **kwargs): pass
"""
AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoFeatureExtractor",
)
NAMED = {"auto_map": dict.fromkeys(AUTO_CLASSES, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
FOREIGN = NAMED | {"model_type": "foreign"}
IMPL = {"impl": "evil.Evil", "pt": ["AutoModel"], "type": "multimodal"}

ALL_DOORS = MMAR_DOORS | {
    "processor": lambda folders: MMARProcessor.from_pretrained(folders / "mmar"),
    "AutoConfig": lambda folders: AutoConfig.from_pretrained(folders / "mmar"),
    "AutoProcessor": lambda folders: AutoProcessor.from_pretrained(folders / "mmar"),
    "AutoTokenizer": lambda folders: AutoTokenizer.from_pretrained(folders / "mmar"),
    "AutoImageProcessor": lambda folders: AutoImageProcessor.from_pretrained(folders / "mmar"),
    "DiffusionPipeline": lambda folders: DiffusionPipeline.from_pretrained(folders / "mmar"),
    "open_processor": lambda folders: open_processor(folders / "mmar"),
    "model_card": lambda folders: mmar("card", folders / "mmar"),
}


def change(file, keys, values):
    """Writes values into a JSON file, below keys."""
    config = json.loads(file.read_text()) if file.exists() else {}
    inner = config
    for key in keys:
        inner = inner.setdefault(key, {})
    inner.update(values)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("file", "keys", "values", "doors"),
    [
        ("mmar/config.json", [], NAMED, ALL_DOORS),
        ("mmar/config.json", [], FOREIGN, ALL_DOORS),
        ("mmar/config.json", ["text_config"], NAMED, ALL_DOORS),
        ("mmar/config.json", ["text_config"], FOREIGN, ALL_DOORS),
        ("mmar/config.json", ["vit_config"], FOREIGN, ALL_DOORS),
        ("mmar/config.json", ["diffusion_config"], FOREIGN, ALL_DOORS),
        ("mmar/config.json", ["vae_config"], NAMED | {"_class_name": ["evil", "Evil"]}, ALL_DOORS),
        ("mmar/config.json", ["image_generation"], NAMED, ALL_DOORS),
        ("mmar/config.json", ["quantization_config"], FOREIGN | {"quant_method": "evil"}, ALL_DOORS),
        ("mmar/config.json", ["custom_pipelines"], {"text-to-image": IMPL, "image-text-to-text": IMPL}, ALL_DOORS),
        ("mmar/processor_config.json", [], NAMED | {"processor_class": "Evil"}, ALL_DOORS),
        ("mmar/processor_config.json", ["image_processor"], NAMED | {"image_processor_type": "Evil"}, ALL_DOORS),
        ("mmar/tokenizer_config.json", [], NAMED, ALL_DOORS),
        ("mmar/tokenizer_config.json", [], NAMED | {"tokenizer_class": "Evil"}, ALL_DOORS),
        ("mmar/preprocessor_config.json", [], NAMED | {"image_processor_type": "Evil"}, ALL_DOORS),
        ("mmar/generation_config.json", [], NAMED | {"custom_generate": "."}, ALL_DOORS),
        ("mmar/model_index.json", [], {"_class_name": ["evil", "Evil"]}, ALL_DOORS),
        ("mmar/model_index.json", [], {"model": ["evil", "Evil"], "processor": ["evil", "Evil"]}, ALL_DOORS),
        ("mmar/model_index.json", [], {"scheduler": ["evil", "Evil"]}, ALL_DOORS),
        ("mmar/scheduler/scheduler_config.json", [], NAMED | {"_class_name": ["evil", "Evil"]}, ALL_DOORS),
        ("qwen2/config.json", [], NAMED, INIT_DOORS),
        ("qwen2/config.json", [], FOREIGN, INIT_DOORS),
        ("qwen2/tokenizer_config.json", [], NAMED | {"tokenizer_class": "Evil"}, INIT_DOORS),
        ("qwen2/generation_config.json", [], NAMED, INIT_DOORS),
        ("preset/config.json", [], FOREIGN, INIT_DOORS),
        ("vae/config.json", [], NAMED | {"_class_name": ["evil", "Evil"]}, VAE_DOORS),
        ("lora/adapter_config.json", [], NAMED, LORA_DOORS),
        (
            "lora/adapter_config.json",
            ["auto_mapping"],
            {"base_model_class": "Evil", "parent_library": "evil"},
            LORA_DOORS,
        ),
        ("lora/config.json", [], FOREIGN, LORA_DOORS),
        # Of the adapter's base.
        ("mmar/config.json", [], FOREIGN, LORA_DOORS),
    ],
)
def test_python_that_a_config_names_is_not_run(folders, tmp_path, monkeypatch, file, keys, values, doors):
    if "auto_mapping" in keys:
        change(folders / file, [], {"auto_mapping": {}})
        monkeypatch.syspath_prepend(folders / "lora")
    change(folders / file, keys, values)
    code = PYTHON.format(canary=str(tmp_path / CANARY))
    for folder in [folders / file.partition("/")[0], *(path for path in folders.glob("mmar/*") if path.is_dir())]:
        (folder / "evil.py").write_text(code)
    (folders / "mmar" / "custom_generate").mkdir()
    (folders / "mmar" / "custom_generate" / "generate.py").write_text(code)
    for name, door in doors.items():
        # Some read what the config says otherwise, some refuse it.
        with contextlib.suppress(Exception):
            door(folders)
        assert not (tmp_path / CANARY).exists(), name


def test_python_that_a_config_names_is_run_for_who_trusts_it(folders, tmp_path):
    """So that the test above could fail."""
    change(folders / "mmar" / "config.json", [], FOREIGN)
    (folders / "mmar" / "evil.py").write_text(PYTHON.format(canary=str(tmp_path / CANARY)))
    with contextlib.suppress(AttributeError):  # it is no config
        AutoConfig.from_pretrained(folders / "mmar", trust_remote_code=True)
    assert (tmp_path / CANARY).exists()

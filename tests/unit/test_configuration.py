"""Presets, derived values, round trips, and the message of every wrong configuration."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from helpers import tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers import AutoConfig, AutoModel, Qwen2Config

from mmar.modeling_mmar.configuration_mmar import (
    KL16_CONFIG,
    PAPER_IMAGE_GENERATION,
    MMARConfig,
    MMARDiffusionConfig,
    MMARViTConfig,
    shorten,
    shorten_names,
)
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = sorted(path.parent for path in CONFIGS.glob("mmar-*/config.json"))
# transformers writes these beside the fields.
WRITTEN = {"model_type", "transformers_version", "architectures", "auto_map", "custom_pipelines"}


def test_defaults_are_the_0_5b_model():
    config = MMARConfig()
    assert (config.num_latents, config.latent_size, config.latent_channels, config.vae_scale_factor) == (
        256,
        16,
        16,
        16,
    )
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (896, 24)
    assert (config.plora_rank, config.plora_alpha) == (512, 128.0)
    assert (config.vit_config.hidden_size, config.vit_config.num_hidden_layers) == (1024, 16)
    assert (config.diffusion_config.hidden_size, config.diffusion_config.num_hidden_layers) == (1024, 8)
    assert config.diffusion_config.prediction_type == "v_prediction"
    assert config.image_generation == {"num_ar_steps": 256, "num_inference_steps": 100, "guidance_scale": 10.0}
    assert config.tie_word_embeddings is True


@pytest.mark.parametrize("config_class", [MMARConfig, MMARViTConfig, MMARDiffusionConfig])
def test_docstring_defaults_equal_the_fields(config_class):
    documented = dict(
        re.findall(r"(\w+) \([^)]*\*optional\*, defaults to `?\"?([^`\")]+)\"?`?\)", config_class.__doc__)
    )
    own = config_class.__dict__["__annotations__"].keys() - {"model_type", "base_config_key", "sub_configs_defaults"}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class) if field.name in own}
    plain = {name: value for name, value in defaults.items() if value is not None}
    assert documented.keys() == plain.keys()
    for name, value in plain.items():
        assert type(value)(documented[name]) == value, name
    # The others are documented too, without a default value.
    for name in defaults.keys() - plain.keys():
        assert re.search(rf"^ +{name} \(", config_class.__doc__, re.MULTILINE), name


@pytest.mark.parametrize("folder", PRESETS, ids=lambda path: path.name)
def test_presets_carry_no_unknown_keys(folder):
    """Strict configs accept unknown keys, so that a misspelt one would go unseen."""
    written = json.loads((folder / "config.json").read_text())
    classes = {"text_config": Qwen2Config, "vit_config": MMARViTConfig, "diffusion_config": MMARDiffusionConfig}

    def check(values, config_class, where):
        unknown = values.keys() - {field.name for field in dataclasses.fields(config_class)} - WRITTEN
        assert not unknown, f"{where}: {unknown}"

    check(written, MMARConfig, "config")
    for name, config_class in classes.items():
        check(written[name], config_class, name)
    assert written["image_generation"].keys() <= PAPER_IMAGE_GENERATION.keys()
    assert written["vae_config"].keys() <= inspect.signature(AutoencoderKL.__init__).parameters.keys()


@pytest.mark.parametrize("folder", PRESETS, ids=lambda path: path.name)
def test_presets_round_trip(folder, tmp_path):
    written = json.loads((folder / "config.json").read_text())
    config = MMARConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    # Every value that stands in the preset is read and written back as it was.
    for name, value in written.items():
        if name == "transformers_version":
            continue
        if isinstance(value, dict) and name != "vae_config":
            assert {key: again[name][key] for key in value} == value, name
        else:
            assert again[name] == value, name
    assert MMARConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_presets_are_there():
    assert {"mmar-tiny", "mmar-0.5b", "mmar-7b"} <= {path.name for path in PRESETS}


def test_0_5b_preset_equals_the_defaults():
    def values(config):
        return {key: value for key, value in config.to_dict().items() if key not in WRITTEN and key[0] != "_"}

    assert values(MMARConfig.from_pretrained(CONFIGS / "mmar-0.5b")) == values(MMARConfig())


def test_7b_preset():
    config = MMARConfig.from_pretrained(CONFIGS / "mmar-7b")
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (3584, 28, 18944)
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (28, 4, 152064)
    assert (text.rope_parameters["rope_theta"], text.rms_norm_eps, text.max_position_embeddings) == (1e6, 1e-6, 32768)
    assert config.tie_word_embeddings is False and text.tie_word_embeddings is False
    assert (config.plora_rank, config.plora_alpha) == (1280, 128.0)
    assert (config.diffusion_config.num_hidden_layers, config.diffusion_config.hidden_size) == (12, 2048)


def test_arguments_are_not_changed():
    vae = {**KL16_CONFIG}
    generation = {"guidance_scale": 2.0}
    config = MMARConfig(vae_config=vae, image_generation=generation)
    config.vae_config["scaling_factor"] = 3.0
    assert vae == KL16_CONFIG and KL16_CONFIG["scaling_factor"] == 1.0 and generation == {"guidance_scale": 2.0}
    assert config.image_generation == {"num_ar_steps": 256, "num_inference_steps": 100, "guidance_scale": 2.0}
    assert PAPER_IMAGE_GENERATION["guidance_scale"] == 10.0


def test_tying_follows_the_text_config():
    for tied in (True, False):
        assert tiny_config(text_config={"tie_word_embeddings": tied}).tie_word_embeddings is tied


def test_sub_configs_may_be_objects():
    vit = MMARViTConfig(hidden_size=48, num_attention_heads=4)
    config = MMARConfig(vit_config=vit, text_config=AutoConfig.for_model("qwen2", vocab_size=200000))
    assert config.vit_config.hidden_size == 48 and config.text_config.vocab_size == 200000


ERRORS = {
    "ViT heads": (
        {"vit_config": {"num_attention_heads": 5}},
        r"`hidden_size` \(48\) of `vit_config` must be a multiple of its `num_attention_heads` \(5\)",
    ),
    "prediction type": (
        {"diffusion_config": {"prediction_type": "sample"}},
        r"`prediction_type` must be one of v_prediction, epsilon; got 'sample'",
    ),
    "beta schedule": (
        {"diffusion_config": {"beta_schedule": "linear"}},
        r"`beta_schedule` must be 'squaredcos_cap_v2'; got 'linear'",
    ),
    "timesteps": (
        {"diffusion_config": {"num_train_timesteps": 0}},
        r"`num_train_timesteps` must be at least 1; got 0",
    ),
    "batch mul": (
        {"diffusion_config": {"diffusion_batch_mul": 0}},
        r"`diffusion_batch_mul` must be at least 1; got 0",
    ),
    "backbone": ({"text_config": {"model_type": "llama"}}, r"`text_config` must be a 'qwen2' config; got 'llama'"),
    "sliding window": (
        {"text_config": {"use_sliding_window": True}},
        r"`text_config.use_sliding_window` must be False.*got True",
    ),
    "image size": ({"image_size": 9}, r"`image_size` \(9\) must be a multiple of 2, the downsampling of `vae_config`"),
    "generation keys": (
        {"image_generation": {"steps": 1}},
        r"`image_generation` may hold num_ar_steps, num_inference_steps, guidance_scale; got steps",
    ),
    "generation steps": (
        {"image_generation": {"num_ar_steps": 0}},
        r"`image_generation\['num_ar_steps'\]` must be an integer of at least 1; got 0",
    ),
    "generation guidance": (
        {"image_generation": {"guidance_scale": float("nan")}},
        r"`image_generation\['guidance_scale'\]` must be a finite number of at least 0; got nan",
    ),
    "negative image size": ({"image_size": -8}, r"`image_size` \(-8\) must be a multiple"),
    "rank": ({"plora_rank": 0}, r"`plora_rank` must be at least 1; got 0"),
    "image token": (
        {"image_token_id": 128},
        r"`image_token_id` \(128\) must lie inside `text_config.vocab_size` \(128\)",
    ),
    "negative image token": ({"image_token_id": -1}, r"`image_token_id` \(-1\) must lie inside"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    overrides, message = ERRORS[name]
    # huggingface_hub wraps the ValueError of a strict config and keeps its message.
    with pytest.raises(StrictDataclassClassValidationError, match=message) as error:
        tiny_config(**overrides)
    assert isinstance(error.value.__cause__, ValueError)


def test_values_in_messages_are_short():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (
        "a" * 10**6,
        ["a" * 10**5] * 50,
        {"k" * 999: deep},
        b"a" * 10**6,
        deep,
        10**4000,
        10**9999,
        ValueError("a" * 10**6),
    ):
        assert 0 < len(shorten(value)) <= (500 if isinstance(value, Exception) else 200)
        assert len(shorten(value, 50)) <= 50
    for value in ("a b", ["a", " "], {"b": 1, "a": None}, {"a": {}}, b"a", 0.5, None):
        assert shorten(value) == repr(value)
    assert shorten("a" * 500 + "end").endswith("aend'")
    assert shorten(ValueError("two\n lines")) == "two lines" and shorten(KeyError()) == "KeyError"
    assert shorten_names(["a", "b"]) == "a, b"
    assert shorten_names("n" * 40).endswith("n, and 10 more")
    assert len(shorten_names(["n" * 10**6] * 10**4)) < 2000


def without(values, *path):
    *above, last = path
    inner = values
    for name in above:
        inner = inner[name]
    del inner[last]
    return values


@pytest.mark.parametrize(
    "path",
    [
        ("image_generation",),
        ("image_generation", "guidance_scale"),
        ("image_generation", "num_ar_steps"),
        ("diffusion_config",),
        ("diffusion_config", "prediction_type"),
        ("diffusion_config", "num_train_timesteps"),
        ("vae_config",),
        ("plora_alpha",),
    ],
    ids=".".join,
)
@pytest.mark.parametrize("open_config", [MMARConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_stored_config_without_what_decides_the_image_is_refused(tmp_path, path, open_config):
    tiny_config().save_pretrained(tmp_path)
    assert open_config(tmp_path).image_generation["guidance_scale"] == 3.0
    file = tmp_path / "config.json"
    file.write_text(json.dumps(without(json.loads(file.read_text()), *path)))
    with pytest.raises(ValueError, match=f"`{path[0]}`"):
        open_config(tmp_path)


def test_a_stored_model_without_its_latent_scale_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(without(json.loads(file.read_text()), "vae_config", "scaling_factor")))
    for open_model in (MMARForConditionalGeneration.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="`vae_config`"):
            open_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"plora_alpha": -8.0}, "plora_alpha"),
        ({"plora_alpha": 0.0}, "plora_alpha"),
        ({"plora_alpha": float("nan")}, "plora_alpha"),
        ({"plora_alpha": float("inf")}, "plora_alpha"),
        ({"vae_config": {"latents_mean": [0.0] * 4}}, "latents_std"),
        ({"vae_config": {"latents_std": [1.0] * 4}}, "latents_mean"),
        ({"vae_config": {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}}, "latents_std"),
        ({"vae_config": {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, -1.0]}}, "latents_std"),
        ({"vae_config": {"latents_mean": [0.0, 0.0, 0.0, float("nan")], "latents_std": [1.0] * 4}}, "latents_mean"),
        ({"vae_config": {"latents_mean": 0.0, "latents_std": 1.0}}, "latents_mean"),
        ({"vae_config": {"scaling_factor": -1.5}}, "scaling_factor"),
        ({"vae_config": {"scaling_factor": float("inf")}}, "scaling_factor"),
        ({"vae_config": {"scaling_factor": None}}, "scaling_factor"),
        ({"vae_config": {"shift_factor": float("nan")}}, "shift_factor"),
        ({"vit_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps"),
        ({"vit_config": {"mlp_ratio": float("inf")}}, "mlp_ratio"),
        ({"diffusion_config": {"layer_norm_eps": -1.0}}, "layer_norm_eps"),
        ({"image_generation": {"guidance_scale": float("nan")}}, "guidance_scale"),
        ({"image_generation": {"guidance_scale": True}}, "guidance_scale"),
    ],
)
def test_values_that_give_another_image_are_refused(changes, name):
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        tiny_config(**changes)

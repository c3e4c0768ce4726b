"""Cards say what is known and nothing else, in metadata that huggingface_hub reads back."""

import json

import pytest
import torch
from commands import mmar
from helpers import tiny_arguments, tiny_config, tiny_model
from huggingface_hub import ModelCard, metadata_load

from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig
from mmar.ablations.modeling_vq_mmar import MMARVQConfig
from mmar.conversion.card import (
    MMARCardFacts,
    count_parameters,
    make_model_card,
    read_evaluation,
)


EVALUATION = {
    "command": "python -m mmar.evaluation.emoji_styles FOLDER --data test.parquet",
    "dataset": {"type": "squares", "name": "Squares", "split": "test"},
    "metrics": [
        {"task": "image-to-text", "type": "exact_match", "name": "colour answered exactly", "value": 0.75},
        {"task": "text-to-image", "type": "frechet", "name": "Frechet distance", "value": 61.0},
    ],
}


def test_nothing_is_invented():
    card = make_model_card(tiny_config(), "me/tiny")
    data = card.data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "tags": ["mmar", "text-to-image", "image-text-to-text", "diffusers", "arxiv:2410.10798"],
    }
    for heading in ("Intended use", "Limitations", "Training data", "Training"):
        assert f"## {heading}\n\nNot stated.\n" in card.text
    assert "No evaluation was recorded" in card.text and "Weights: not stated." in card.text
    assert "16 of 4 channels for a picture of 8 x 8 pixels" in card.text


def test_facts_and_figures_come_back(tmp_path):
    facts = MMARCardFacts(
        title="Squares",
        license="cc-by-sa-4.0",
        language=["en"],
        datasets=["squares"],
        base_model=["Qwen/Qwen2-0.5B-Instruct"],
        training="`make train`",
        limitations="Draws squares only.",
        prompt="a red square",
    )
    card = make_model_card(tiny_config(), "me/tiny", facts, [EVALUATION])
    card.save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("cc-by-sa-4.0", ["en"], ["squares"])
    assert card.data.base_model == ["Qwen/Qwen2-0.5B-Instruct"]
    results = [
        (r.task_type, r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results
    ]
    assert results == [
        ("image-to-text", "squares", "test", "exact_match", 0.75),
        ("text-to-image", "squares", "test", "frechet", 61.0),
    ]
    assert metadata_load(tmp_path / "README.md")["model-index"][0]["name"] == "tiny"
    assert "| colour answered exactly | 0.75 |" in card.text and EVALUATION["command"] in card.text
    assert 'pipe("a red square"' in card.text and "Draws squares only." in card.text


def test_backbone_is_named_where_the_config_names_it():
    config = tiny_config()
    config.frozen_parts = {"backbone": {"repo_id": "Qwen/Qwen2-0.5B-Instruct", "revision": "abc"}}
    assert make_model_card(config, "me/tiny").data.base_model == ["Qwen/Qwen2-0.5B-Instruct"]
    config.frozen_parts = {"backbone": {"repo_id": "/home/me/qwen2"}}  # nobody else's business
    assert make_model_card(config, "me/tiny").data.base_model is None


def test_what_other_systems_lack_is_left_out():
    vq = MMARVQConfig(
        **tiny_arguments() | {"vae_config": {**tiny_config().vae_config, "num_vq_embeddings": 2048, "vq_embed_dim": 4}}
    )
    text = make_model_card(vq, "me/vq").text
    assert "| image head | a linear to 2,048 codes, cross entropy |" in text and "| EmbeddingViT | 2 layers" in text
    assert "diffusion MLP" not in text
    epsilon = tiny_arguments(diffusion_config={"prediction_type": "epsilon"})
    text = make_model_card(MMARTransfusionConfig(**epsilon), "me/transfusion").text
    assert "| image head | a linear, epsilon; the language model denoises |" in text
    assert "up to 500 in training and of 0 at inference" in text
    assert not any(name in text for name in ("EmbeddingViT", "diffusion MLP"))


def test_parameters_are_counted_once():
    model = tiny_model()
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["PLoRA"] == sum(p.numel() for n, p in model.named_parameters() if n.endswith(("image_A", "image_B")))
    assert counts["VAE"] == sum(parameter.numel() for parameter in model.vae.parameters())
    assert f"PLoRA {counts['PLoRA']:,}" in make_model_card(model.config, "me/tiny", num_parameters=counts).text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"licence": "mit"}, "may hold title, .*; got licence"),
        ({"license": ["mit"]}, "`license` must be a text"),
        ({"datasets": "squares"}, "`datasets` must be a list of texts"),
        ({"language": [1]}, "`language` must be a list of texts"),
        (["mit"], "names and values; got list"),
    ],
)
def test_wrong_facts(values, message):
    with pytest.raises(ValueError, match=message):
        MMARCardFacts.from_dict(values)


@pytest.mark.parametrize("missing", ["command", "dataset", "metrics"])
def test_wrong_evaluation(tmp_path, missing):
    (tmp_path / "result.json").write_text(json.dumps({k: v for k, v in EVALUATION.items() if k != missing}))
    with pytest.raises(ValueError, match=f"{missing}"):
        read_evaluation(tmp_path / "result.json")
    (tmp_path / "result.json").write_text("[")
    with pytest.raises(ValueError, match="evaluation"):
        read_evaluation(tmp_path / "result.json")


def test_command(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    tiny_config().save_pretrained(tmp_path / "tiny")
    (tmp_path / "facts.yaml").write_text("license: mit\nlanguage: [en]\n")
    (tmp_path / "result.json").write_text(json.dumps(EVALUATION))
    arguments = [str(tmp_path / "tiny"), "--facts", str(tmp_path / "facts.yaml")]
    mmar("card", *arguments, "--evaluation", tmp_path / "result.json")
    assert capsys.readouterr().out.strip() == str(tmp_path / "tiny" / "README.md")
    card = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert card.data.license == "mit" and len(card.data.eval_results) == 2
    assert [path.name for path in (tmp_path / "tiny").iterdir() if path.suffix == ".unfinished"] == []

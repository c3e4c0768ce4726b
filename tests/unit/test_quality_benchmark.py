"""Quality against time: which settings, kept drawings, and the page; with a judge that a test can know."""

import sys

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from mmar.benchmarks import quality
from mmar.evaluation import judging
from mmar.modeling_mmar.generation_mmar import PRESETS
from mmar.modeling_mmar.masking_mmar import ORDERS


JUDGE = """
import json, pathlib, sys
lines = (pathlib.Path(sys.argv[1]) / "captions.jsonl").read_text().splitlines()
print(json.dumps({"name_top1": 0.5, "name_top5": 0.75, "style": 1.0, "frechet": float(len(lines))}))
"""
ROWS = [{"captions": [f"a thing {i}"], "label": f"thing {i}", "style": "flat"} for i in range(3)]


class Model(torch.nn.Linear):
    pass


class Pipe:
    """Draws white pictures and remembers how it was asked."""

    def __init__(self):
        self.model, self.scheduler, self.calls = Model(2, 2), DDIMScheduler(), []
        self.device = torch.device("cpu")

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, prompts, generator, **kwargs):
        self.calls.append((len(prompts), type(self.scheduler).__name__, kwargs))
        return type("Output", (), {"images": [Image.new("RGB", (4, 4), "white")] * len(prompts)})


def test_every_opt_in_setting_is_varied():
    groups = quality.settings(16)
    arguments = [own for variants in groups.values() for own in variants.values()]
    assert {own["preset"] for own in arguments if "preset" in own} == set(PRESETS)
    assert {own["order"] for own in arguments if "order" in own} == set(ORDERS)
    assert {own["scheduler"] for own in arguments if "scheduler" in own} == set(judging.SCHEDULERS)
    assert sorted(own["num_ar_steps"] for own in groups["AR steps, 100 steps of DDPM"].values()) == [1, 2, 4, 8]
    assert any("guidance_interval" in own for own in arguments)
    assert any(isinstance(own.get("num_inference_steps"), tuple) for own in arguments)


def test_drawings_are_judged_once_and_kept(tmp_path):
    judge, pipe = tmp_path / "judge.py", Pipe()
    judge.write_text(JUDGE)
    arguments = {"num_inference_steps": 5, "scheduler": "DPM-Solver++"}
    judged = judging.run(pipe, ROWS, judge, tmp_path / "drawings", 0, arguments)
    assert judged["name_top1"] == 0.5 and judged["frechet"] == 3.0 and judged["seconds"] > 0
    assert pipe.calls == [(3, "DPMSolverMultistepScheduler", {"num_inference_steps": 5})]
    assert type(pipe.scheduler) is DDIMScheduler
    assert judging.run(pipe, ROWS, judge, tmp_path / "drawings", 0, arguments) == judged
    assert len(pipe.calls) == 1


@pytest.mark.parametrize("says", ["print('no json')", "raise SystemExit(3)", "print('{}')"])
def test_a_judge_that_fails(tmp_path, says):
    judge = tmp_path / "judge.py"
    judge.write_text(says)
    with pytest.raises(ValueError, match="judge.py"):
        judging.run(Pipe(), ROWS, judge, tmp_path / "drawings", 0, {})
    assert not (tmp_path / "drawings" / "judged.json").exists()


def test_drawings_of_other_settings_have_other_folders(tmp_path):
    judge, other_judge, scheduler = tmp_path / "judge.py", tmp_path / "other.py", DDIMScheduler()
    judge.write_text(JUDGE)
    other_judge.write_text(JUDGE + "# stricter")
    folders = {
        judging.folder_of(tmp_path, judge, scheduler, 0, {"order": "raster"}),
        judging.folder_of(tmp_path, judge, scheduler, 0, {"order": "random"}),
        judging.folder_of(tmp_path, judge, scheduler, 3, {"order": "raster"}),
        judging.folder_of(tmp_path, other_judge, scheduler, 0, {"order": "raster"}),
        judging.folder_of(tmp_path, judge, DDIMScheduler(steps_offset=1), 0, {"order": "raster"}),
    }
    assert len(folders) == 5
    same = judging.folder_of(tmp_path, judge, DDIMScheduler(), 0, {"order": "raster"})
    assert same in folders


def test_a_folder_belongs_to_a_model_and_its_rows(tmp_path):
    pipe = Pipe()
    judging.claim(tmp_path / "work", pipe, ROWS)
    judging.claim(tmp_path / "work", pipe, ROWS)
    with pytest.raises(ValueError, match="rows"):
        judging.claim(tmp_path / "work", pipe, ROWS[:2])
    torch.nn.init.zeros_(pipe.model.weight)
    with pytest.raises(ValueError, match="--work"):
        judging.claim(tmp_path / "work", pipe, ROWS)


def test_page_and_plot(tmp_path):
    judged = [
        {"seconds": seconds, "name_top1": share, "name_top5": 0.8, "style": 0.9, "frechet": 20.0}
        for seconds, share in ((0.1, 0.5), (0.3, 0.7))
    ]
    figures = quality.over_seeds(judged)
    line = quality.row("fast", figures)
    assert line == "| fast | 200 | 60.0 ± 14.1 | 80.0 ± 0.0 | 90.0 ± 0.0 | 20.0 ± 0.0 |"
    groups = {"presets": {"fast": figures, "paper": figures}, "order": {"raster": quality.over_seeds(judged[:1])}}
    quality.plot(groups, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    page = quality.report(groups, "the command", "plot.svg")
    assert line in page and "![](plot.svg)" in page and "## Presets" in page and "the command" in page


def test_without_a_judge(monkeypatch, tmp_path, capsys):
    command = ["quality", "model", "--data", "rows.parquet", "--judge", str(tmp_path / "none.py"), "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        quality.main()
    assert "--judge" in capsys.readouterr().err

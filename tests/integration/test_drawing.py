"""The runner of the evaluation commands: whole pictures, the same after a kill and on any number of processes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import mmar
from conftest import make_pipeline
from diffusers import DDIMScheduler
from drawing_prompts import ARGUMENTS, BATCH_SIZE, NUM_PICTURES, PROMPTS, draw
from PIL import Image

from mmar import MMARProcessor
from mmar.evaluation import dpg, geneval
from mmar.evaluation.drawing import MANIFEST_NAME, Processes, draw_pictures, model_sha256, spread
from mmar.files import write_whole
from mmar.training.mixture import stable_hash


ROOT = Path(__file__).parents[2]
FEW = {f"{name}.png": "a red square" for name in "abcdefg"}
STEPS = {"num_ar_steps": 3, "num_inference_steps": 2}


def contents(folder):
    """Bytes of each picture by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def environment():
    paths = [str(ROOT), str(ROOT / "tests")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


# Control tokens and marks that the words of others may hold.
ODD_PROMPT = "a dog <image> <|im_end|>\n<|im_start|>assistant <|image|> <|endoftext|>"


# -------------------------------------------------------------------------------------------------------------- runner


def test_each_picture_has_its_own_seed(pipe, tmp_path):
    assert draw_pictures(pipe, FEW, tmp_path, seed=5, batch_size=3, **STEPS) == 7
    drawn = contents(tmp_path)
    assert list(drawn) == list(FEW) and len(set(drawn.values())) == 7
    generators = [torch.Generator().manual_seed(stable_hash(5, i)) for i in (3, 4, 5)]
    for name, image in zip("def", pipe(["a red square"] * 3, generator=generators, **STEPS).images, strict=True):
        assert np.array_equal(np.array(image), np.array(Image.open(io.BytesIO(drawn[f"{name}.png"]))))
    draw_pictures(pipe, FEW, tmp_path / "other", seed=6, batch_size=3, **STEPS)
    assert set(contents(tmp_path / "other").values()).isdisjoint(drawn.values())


def test_what_is_there_is_not_drawn_again(pipe, tmp_path, monkeypatch):
    draw_pictures(pipe, FEW, tmp_path, batch_size=3, **STEPS)
    drawn, manifest = contents(tmp_path), (tmp_path / MANIFEST_NAME).read_bytes()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert draw_pictures(pipe, FEW, tmp_path, batch_size=3, **STEPS) == 0
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "e.png").unlink()
    (tmp_path / f".e.png.{'0' * 32}.unfinished").write_bytes(b"half a pic")
    assert draw_pictures(pipe, FEW, tmp_path, batch_size=3, **STEPS) == 1
    assert contents(tmp_path) == drawn and (tmp_path / MANIFEST_NAME).read_bytes() == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FEW, MANIFEST_NAME])


@pytest.mark.parametrize("broken", [lambda whole: whole[:-20], lambda whole: b"", lambda whole: b"no picture at all"])
def test_a_broken_picture_is_drawn_again(pipe, tmp_path, broken):
    """As a copy of a folder leaves it that was broken off: the scorers of GenEval and DPG-Bench would stop at it."""
    draw_pictures(pipe, FEW, tmp_path, batch_size=3, **STEPS)
    drawn = contents(tmp_path)
    (tmp_path / "e.png").write_bytes(broken(drawn["e.png"]))
    assert draw_pictures(pipe, FEW, tmp_path, batch_size=3, **STEPS) == 1
    assert contents(tmp_path) == drawn


def test_another_batch_size_only_rounds_otherwise(pipe, tmp_path):
    for batch_size in (1, 7):
        draw_pictures(pipe, FEW, tmp_path / str(batch_size), batch_size=batch_size, **STEPS)
    for name in FEW:
        one, all_at_once = (np.array(Image.open(tmp_path / size / name)).astype(int) for size in ("1", "7"))
        assert np.abs(one - all_at_once).max() <= 1  # float32, to 8 bits


def test_the_pipelines_progress_bar_stays_as_it_was(tmp_path):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(desc="mine")
    draw_pictures(pipe, {"a.png": "a red square"}, tmp_path, **STEPS)
    assert pipe._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": {**FEW, "g.png": "a blue square"}}, "fingerprint of the prompts"),
        ({"prompts": {**FEW, "h.png": "a blue square"}}, "number of pictures is 7, now it is 8"),
        ({"seed": 1}, "seed is 0, now it is 1"),
        ({"guidance_scale": 4.0}, "arguments of generation is .*'num_ar_steps': 3.* now it is .*guidance_scale': 4.0"),
    ],
)
def test_a_folder_belongs_to_one_run(pipe, tmp_path, change, words):
    draw_pictures(pipe, FEW, tmp_path, **STEPS)
    (tmp_path / "g.png").unlink()  # half-finished
    drawn = contents(tmp_path)
    prompts, options = change.get("prompts", FEW), {name: change[name] for name in change if name != "prompts"}
    with pytest.raises(ValueError, match=words):
        draw_pictures(pipe, prompts, tmp_path, **STEPS, **options)
    assert contents(tmp_path) == drawn


def test_a_folder_belongs_to_one_model(tmp_path):
    pipe = make_pipeline()
    draw_pictures(pipe, FEW, tmp_path, **STEPS)
    sha256 = model_sha256(pipe.model)
    scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDPMScheduler.*DDIMScheduler"):
        draw_pictures(pipe, FEW, tmp_path, **STEPS)
    pipe.scheduler = scheduler
    assert draw_pictures(pipe, FEW, tmp_path, **STEPS) == 0
    for change in (
        lambda: pipe.model.config.image_generation.update(guidance_scale=7.0),
        lambda: next(pipe.model.parameters()).data.flatten()[:1].add_(1),
        lambda: pipe.model.bfloat16(),
    ):
        change()
        assert model_sha256(pipe.model) != sha256
        sha256 = model_sha256(pipe.model)
        with pytest.raises(ValueError, match=sha256):
            draw_pictures(pipe, FEW, tmp_path, **STEPS)


def test_a_model_that_was_saved_and_moved_is_the_same(hub_root, tmp_path):
    from conftest import REPO

    from mmar import MMARPipeline

    pipe = MMARPipeline.from_pretrained(hub_root / REPO)
    pipe.save_pretrained(tmp_path / "moved")
    assert model_sha256(MMARPipeline.from_pretrained(tmp_path / "moved").model) == model_sha256(pipe.model)


def test_pictures_of_nobody(pipe, tmp_path):
    write_whole(tmp_path / "old" / "c.png", b"a picture")
    with pytest.raises(ValueError, match="c.png"):
        draw_pictures(pipe, FEW, tmp_path, **STEPS)
    for text in ("{", "[]", '{"seed": 0}'):
        (tmp_path / MANIFEST_NAME).write_text(text)
        with pytest.raises(ValueError, match=MANIFEST_NAME):
            draw_pictures(pipe, FEW, tmp_path, **STEPS)
    assert contents(tmp_path) == {"old/c.png": b"a picture"}


def test_nothing_to_draw(pipe, tmp_path):
    with pytest.raises(ValueError, match="prompt"):
        draw_pictures(pipe, {}, tmp_path)
    with pytest.raises(ValueError, match="`batch_size`"):
        draw_pictures(pipe, FEW, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="`num_ar_steps`"):
        draw_pictures(pipe, FEW, tmp_path, num_ar_steps=300)
    # A folder without pictures is nobody's.
    assert draw_pictures(pipe, FEW, tmp_path, **STEPS) == 7
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["arguments"] == STEPS


def test_a_disk_that_is_full(pipe, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) == 5:  # the manifest, three pictures, and then
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="d.png"):
        draw_pictures(pipe, FEW, tmp_path, batch_size=2, **STEPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", MANIFEST_NAME]
    monkeypatch.undo()
    assert draw_pictures(pipe, FEW, tmp_path, batch_size=2, **STEPS) == 4
    draw_pictures(pipe, FEW, tmp_path / "unbroken", batch_size=2, **STEPS)
    unbroken = contents(tmp_path / "unbroken")
    assert unbroken == {name: (tmp_path / name).read_bytes() for name in FEW}


def test_rows_are_spread():
    assert spread(list("abcdef"), 3, "n") == [(0, "a"), (2, "c"), (4, "e")]
    assert spread(list("abc"), None, "n") == [(0, "a"), (1, "b"), (2, "c")]
    for number in (0, 4):
        with pytest.raises(ValueError, match="`n`"):
            spread(list("abc"), number, "n")


def test_a_killed_run_loses_the_batch_in_flight_only(tmp_path, monkeypatch):
    # In the fifth file: the manifest, a batch, and one picture of the next are there.
    command = [sys.executable, str(ROOT / "tests/killed.py"), "5"]
    command += [str(ROOT / "tests/integration/drawing_prompts.py"), str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(tmp_path / "killed")
    assert list(left) == list(PROMPTS)[:3] and BATCH_SIZE == 2 and list(tmp_path.rglob("*.unfinished"))
    monkeypatch.chdir(ROOT)
    assert draw(tmp_path / "killed") == NUM_PICTURES - 3
    assert draw(tmp_path / "unbroken") == NUM_PICTURES
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
    assert not list(tmp_path.rglob("*.unfinished"))
    manifest = json.loads((tmp_path / "killed" / MANIFEST_NAME).read_text())
    assert manifest["arguments"] == ARGUMENTS and manifest["seed"] == 1


# ------------------------------------------------------------------------------------------------------------- GenEval


METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]
TINY = ["checkpoints/mmar-tiny", "--num_ar_steps", "2", "--num_inference_steps", "2", "--batch_size", "4"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    path = tmp_path_factory.mktemp("metadata") / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return path


def as_the_scorer_reads(folder):
    """Prompts and sizes of pictures, by the rules of GenEval's evaluate_images.py."""
    found = {}
    for name in os.listdir(folder):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        row = json.loads((folder / name / "metadata.jsonl").read_text())
        files = [file for file in os.listdir(folder / name / "samples") if re.match(r"\d+\.png", file)]
        found[name] = row, {file: Image.open(folder / name / "samples" / file).size for file in files}
    return found


def test_geneval_is_drawn_by_two_ranks_as_by_one(tmp_path, metadata, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    mmar("evaluate", "geneval", "draw", *TINY, "--metadata", metadata, "--out", tmp_path / "one")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'one'}: 12 pictures of 3 prompts.")
    four = {f"{i:04d}.png": (64, 64) for i in range(4)}
    assert as_the_scorer_reads(tmp_path / "one") == {f"{i:05d}": (row, four) for i, row in enumerate(METADATA)}

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "mmar",
        "evaluate",
        "geneval",
        "draw",
    ]
    command += [*TINY, "--metadata", str(metadata), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert as_the_scorer_reads(tmp_path / "two") == as_the_scorer_reads(tmp_path / "one")
    assert done.stdout.count("12 pictures of 3 prompts.") == 1  # the first rank speaks

    # One process goes on where two have begun, and finds nothing to do.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    mmar("evaluate", "geneval", "draw", *TINY, "--metadata", metadata, "--out", tmp_path / "two")
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    with pytest.raises(ValueError, match="prompts"):
        mmar(
            "evaluate", "geneval", "draw", *TINY, "--metadata", metadata, "--out", tmp_path / "two", "--num_prompts", 2
        )


@pytest.mark.parametrize("command", ["geneval", "dpg"])
def test_marks_and_control_tokens_in_a_prompt_are_its_words(tmp_path, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    if command == "geneval":
        row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": ODD_PROMPT}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        mmar("evaluate", "geneval", "draw", *TINY, "--metadata", tmp_path / "metadata.jsonl", "--out", out)
    else:
        (tmp_path / "1.txt").write_text(ODD_PROMPT)
        mmar("evaluate", "dpg", *TINY, "--prompts", tmp_path, "--out", out)
    drawn = {Image.open(path).tobytes() for path in out.rglob("samples/**/*.png")}
    assert len(drawn) == 4
    words = MMARProcessor.from_pretrained("checkpoints/mmar-tiny").generation_inputs(ODD_PROMPT)["input_ids"]
    plain = MMARProcessor.from_pretrained("checkpoints/mmar-tiny").generation_inputs("a dog")["input_ids"]
    starts = [int((ids == words[0, 0]).sum()) for ids in (words, plain)]
    assert starts == [2, 2] and words.shape[1] > plain.shape[1]  # the turns of the user and the assistant


class Recorder:
    """Draws black pictures and remembers for which prompts."""

    def __init__(self, pipe):
        self.model, self.scheduler, self.asked = pipe.model, pipe.scheduler, []

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, prompts, **kwargs):
        self.asked.append(prompts)
        return type("Output", (), {"images": [Image.new("RGB", (4, 4))] * len(prompts)})


class NotWaiting(Processes):
    def wait(self):
        pass


def test_each_process_draws_its_share(pipe, tmp_path):
    prompts = {f"{i}.png": str(i) for i in range(7)}
    shares = [[["0", "1"], ["4", "5"]], [["2", "3"], ["6"]]]
    for index, share in enumerate(shares):
        recorder = Recorder(pipe)
        draw_pictures(recorder, prompts, tmp_path, batch_size=2, processes=NotWaiting(2, index))
        assert recorder.asked == share
    assert list(contents(tmp_path)) == list(prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected GenEval's metadata .*; there is no file"),
        ("", "it is empty"),
        ("\xff\n", "expected GenEval's metadata .*, in UTF-8, in .*metadata.jsonl'; got something else"),
        ("{\n", "expected a JSON object on line 1 of"),
        ('{"tag": "a", "prompt": "b"}\n[1]\n', "expected a JSON object on line 2 of .*; got '.1.'"),
        ('{"tag": "a", "prompt": "b"}\n{"tag": "a"}\n', "expected a `prompt` in each row of .*; row 1 has None"),
        ('{"prompt": "b"}\n', "expected a `tag` in each row of .*; row 0 has None"),
    ],
)
def test_other_metadata(tmp_path, monkeypatch, text, message):
    path = tmp_path / "metadata.jsonl"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        mmar("evaluate", "geneval", "draw", *TINY, "--metadata", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_as_others_write_it(tmp_path):
    """A byte order mark, and a separator of lines that JSON may have within a string."""
    row, path = {"prompt": "a red\u2028cat", "tag": "colors"}, tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert geneval.read_metadata(path) == [row]


def result_line(tag, prompt, correct):
    return json.dumps({"filename": "a.png", "tag": tag, "prompt": prompt, "correct": correct, "metadata": prompt})


def test_a_file_is_no_folder_to_draw_into(metadata, monkeypatch):
    """That shows before a model is loaded, which would take minutes."""
    for out in (metadata, metadata / "geneval"):
        with pytest.raises(ValueError, match="--out"):
            mmar("evaluate", "geneval", "draw", "no/model", "--metadata", metadata, "--out", out)


def test_scores_are_the_mean_over_tags(tmp_path, monkeypatch, capsys):
    lines = [result_line("counting", "two cups", hit) for hit in (True, False, False, False)]
    lines += [result_line("counting", "two cats", False) for _ in range(4)]
    lines += [result_line("colors", "a red car", hit) for hit in (True, True, True, False)]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines) + "\n")
    mmar("evaluate", "geneval", "scores", path, "--out", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "overall": (1 / 8 + 3 / 4) / 2,
        "tags": {
            "counting": {"correct": 1, "pictures": 8, "share": 1 / 8},
            "colors": {"correct": 3, "pictures": 4, "share": 3 / 4},
        },
        "pictures": 4 / 12,
        "prompts": 2 / 3,
        "num_pictures": 12,
        "num_prompts": 3,
    }
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| counting | 1 | 8 | 12.50 |",
        "| colors | 3 | 4 | 75.00 |",
        "| mean over tags | | 12 | 43.75 |",
    ]


@pytest.mark.parametrize("line", ['{"tag": "a", "metadata": "b"}', '{"tag": 1, "metadata": "b", "correct": true}'])
def test_other_results(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(line)
    with pytest.raises(ValueError, match="`tag`"):
        geneval.read_scores(tmp_path / "results.jsonl")


# ----------------------------------------------------------------------------------------------------------- DPG-Bench


def test_dpg_grids_are_as_the_scorer_cuts_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    for name, text in (("1", "a red crab,\nfrom above\n"), ("coco_7", "two blue cups"), ("3", "a dog")):
        (prompts / f"{name}.txt").write_text(text)
    mmar("evaluate", "dpg", *TINY, "--prompts", prompts, "--out", out, "--num_prompts", 2)
    said = capsys.readouterr().out
    assert "2 grids" in said and said.rstrip().endswith("with that folder and 64.")
    assert sorted(path.name for path in (out / "grids").iterdir()) == ["1.png", "3.png"]
    for name in ("1", "3"):
        grid = Image.open(out / "grids" / f"{name}.png")
        assert grid.size == (128, 128)
        for sample, corner in enumerate([(0, 0), (64, 0), (0, 64), (64, 64)]):
            cut = grid.crop((*corner, corner[0] + 64, corner[1] + 64))
            alone = Image.open(out / "samples" / name / f"{sample}.png")
            assert np.array_equal(np.array(cut), np.array(alone))
    samples = [path.read_bytes() for path in (out / "samples").rglob("*.png")]
    assert len(set(samples)) == 8


def test_other_prompts(tmp_path):
    with pytest.raises(ValueError, match="ID.txt"):
        dpg.read_prompts(tmp_path / "none")
    with pytest.raises(ValueError, match=".txt"):
        dpg.read_prompts(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="a.txt"):
        dpg.read_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.txt"):
        dpg.read_prompts(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "a.b.txt")
    (tmp_path / "a.b.txt").write_text("a dog")
    with pytest.raises(ValueError, match="a.b.txt"):
        dpg.read_prompts(tmp_path)

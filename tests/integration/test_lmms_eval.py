"""The plugin of lmms-eval with the real kit, offline, in processes of its own."""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_pipeline
from kits import ROOT, needs, run_kit
from PIL import Image
from squares import COLOURS

from mmar.evaluation.answers import MMARAnswerer


NLVR = ROOT.parent / "shared" / "data" / "vqa-mini" / "nlvr1-train-00000-of-00001.parquet"
needs_kit = needs("lmms_eval")
UTILS = """
import io

from PIL import Image

def pictures(document):
    image = document["image"]
    return [Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image]

def exact(document, results):
    return {"exact": float(results[0] == document["answer"])}

def mean_log_likelihood(document, results):
    return {"nats": results[0][0]}
"""
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
ANSWER = """
generation_kwargs:
  max_new_tokens: 6
  until: ["never written"]
process_results: !function utils.exact
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """
doc_to_choice: {choices}
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
LIKELIHOOD = """
process_results: !function utils.mean_log_likelihood
metric_list:
  - metric: nats
    aggregation: mean
    higher_is_better: true
"""


def user(picture, text):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def square(colour):
    return Image.new("RGB", (8, 8), colour)


def write_task(folder, name, kind, data, rest):
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data) + rest)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "mmar"
    make_pipeline().save_pretrained(folder)
    return folder


def run_tasks(home, model, model_args, tasks, folder, *more):
    arguments = ["--model", model, "--model_args", model_args, "--tasks", tasks, "--include_path", folder]
    arguments += ["--batch_size", 3, "--output_path", home / "out", "--log_samples", *more]
    done = run_kit(home, "lmms_eval", *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    files = list((home / "out").rglob("*_results.json"))
    assert len(files) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(files[0].read_text())["results"]
    return {
        name: {key.split(",")[0]: value for key, value in scores.items() if "stderr" not in key}
        for name, scores in results.items()
    }


@needs_kit
def test_requests_are_answered_and_scored_as_the_model_does(model, tmp_path):
    script = ROOT / "tests" / "integration" / "lmms_eval_calls.py"
    done = run_kit(tmp_path, script, model, tmp_path / "answer.json")
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads((tmp_path / "answer.json").read_text())
    assert result["classes"] == ["mmar.evaluation.lmms_eval_plugin"] * 2
    assert result["manifest"] == "mmar.evaluation.lmms_eval_plugin.MMARForLMMSEval"
    assert result["ranks"] == [0, 1, "cpu", 2]

    answerer = MMARAnswerer.from_pretrained(str(model))
    image = {colour: {"type": "image", "image": square(colour)} for colour in COLOURS}

    def text(value):
        return {"type": "text", "text": value}

    contents = [
        [image["red"], text("Which colour?")],
        [text("Which colour?")],
        [text("Describe "), image["blue"], text(" and "), image["green"], text(" the image.")],
    ]
    chats = [[{"role": "user", "content": content}] for content in contents]
    long, short = (answerer.answer(chats, max_new_tokens=length) for length in (6, 3))
    assert result["answers"] == [answer for pair in zip(long, short, strict=True) for answer in pair]
    stop, cut = result["cut"]
    assert cut == long[0].split(stop)[0].strip() and len(cut) < len(long[0])

    chats[2][0]["content"] = [image["blue"], image["green"], text("Which colour?")]
    assert result["chat answers"] == answerer.answer(chats, max_new_tokens=6)
    rounds = [long[0]]
    for _ in range(2):
        again = [{"role": "user", "content": [text(f"Again: {rounds[-1]}")]}]
        rounds += answerer.answer([again], max_new_tokens=6)
    assert result["rounds"] == result["chat rounds"] == [rounds]

    chats[2][0]["content"] = contents[2]
    expected = answerer.log_likelihoods([*chats, chats[1]], ["red", "red", "red", " red"])
    for got, (value, is_greedy) in zip(result["likelihoods"], expected, strict=True):
        # float32, padded in other batches.
        assert got[0] == pytest.approx(value, rel=1e-5) and got[0] < 0 and got[1] == is_greedy
    losses = answerer.log_likelihoods([chats[0]] * 2, ["red", "green"])
    assert [value for value, _ in result["choices"]] == pytest.approx([-value for value, _ in losses], rel=1e-5)
    # Log-likelihoods are what they are without the kit's cache, answers are taken from it.
    assert len(result["cached"]) == 2
    for (loss, is_greedy), answer in result["cached"]:
        assert loss == pytest.approx(result["choices"][0][0], rel=1e-5)
        assert [is_greedy, answer] == [result["choices"][0][1], short[0]]
    refused = result["refused"]
    assert refused["batch"] == "--batch_size must be a number for MMAR; got 'auto'."
    assert refused["model"].startswith("expected an MMAR with processor_config.json")
    assert all("An image must be here itself" in refused[name] for name in ("place", "place in a chat"))
    assert refused["likelihood"].endswith("log-likelihoods are served by `--model mmar`.")


@needs_kit
def test_tasks_get_the_scores_that_the_models_answers_deserve(model, tmp_path):
    answerer = MMARAnswerer.from_pretrained(str(model))
    questions = ["Which colour?", "Describe the image."]
    pairs = [(colour, question) for colour in COLOURS for question in questions]
    chats = [user(square(colour), question) for colour, question in pairs]
    answers = answerer.answer(chats, max_new_tokens=6)
    scores = [answerer.log_likelihoods([chat] * len(COLOURS), COLOURS) for chat in chats]
    chosen = [max(range(len(COLOURS)), key=lambda i, row=row: row[i][0]) for row in scores]
    # The right answer is the model's own, but for the last two rows.
    right = [*answers[:6], "wrong", "wrong"]
    options = [*chosen[:6], *((index + 1) % len(COLOURS) for index in chosen[6:])]
    rows = []
    for (colour, question), answer, option in zip(pairs, right, options, strict=True):
        buffer = io.BytesIO()
        square(colour).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": image, "question": question, "answer": answer, "option": COLOURS[option]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "squares.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    data = tmp_path / "squares.parquet"
    write_task(tmp_path / "tasks", "mmar_answers", "generate_until", data, ANSWER)
    choice = CHOICE.format(choices=COLOURS) + 'doc_to_target: "{{option}}"\n'
    write_task(tmp_path / "tasks", "mmar_choices", "multiple_choice", data, choice)
    write_task(tmp_path / "tasks", "mmar_likelihoods", "loglikelihood", data, LIKELIHOOD)

    tasks = "mmar_answers,mmar_choices,mmar_likelihoods"
    results = run_tasks(tmp_path / "simple", "mmar", f"pretrained={model}", tasks, tmp_path / "tasks")
    assert results["mmar_answers"]["exact"] == pytest.approx(0.75)
    assert results["mmar_choices"]["acc"] == pytest.approx(0.75)
    nats = [value for value, _ in answerer.log_likelihoods(chats, right)]
    assert results["mmar_likelihoods"]["nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    results = run_tasks(
        tmp_path / "chat", "mmar_chat", f"pretrained={model}", "mmar_answers", tmp_path / "tasks", "--limit", 4
    )
    assert results["mmar_answers"]["exact"] == 1.0


@needs_kit
@pytest.mark.skipif(not NLVR.is_file(), reason="needs the small benchmarks of shared/")
def test_the_bundled_model_on_real_statements(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    task = TASK.replace("{{{{question}}}}", "Is it true? {{{{caption}}}}").replace("{{{{answer}}}}", "{{{{label}}}}")
    task = task.format(name="nlvr1_choice", kind="multiple_choice", data=NLVR)
    (tmp_path / "tasks" / "nlvr1_choice.yaml").write_text(task + CHOICE.format(choices=["true", "false"]))
    results = run_tasks(
        tmp_path, "mmar", "pretrained=checkpoints/mmar-tiny", "nlvr1_choice", tmp_path / "tasks", "--limit", 8
    )
    assert 0 <= results["nlvr1_choice"]["acc"] <= 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_entry_point_names_what_is_there():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["entry-points"]["lmms_eval.models"]["mmar"].split(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert f"\ndef {function}(" in path.read_text(encoding="utf-8")

"""The adapter of VLMEvalKit with the real kit, in processes of its own, and what it says without the kit."""

import base64
import csv
import importlib.util
import io
import json
import subprocess
import sys

import pytest
from conftest import make_pipeline
from kits import KITS, ROOT, needs, run_kit
from PIL import Image
from squares import COLOURS

from mmar.evaluation.answers import MMARAnswerer


VQA_MINI = ROOT.parent / "shared" / "data" / "vqa-mini"
needs_kit = needs("vlmeval")


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Eight rows a table; beside it the answers to give from the third row on, three of six of them right."""
    folder = tmp_path_factory.mktemp("tables")
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(folder / f"{colour}.png")
    rows, choices = [], []
    for index in range(8):
        # The picture of a later row may stand in an earlier one.
        image = picture(COLOURS[index]) if index < 4 else str(index - 4)
        row = {"index": str(index), "image": image, "question": f"Is it {COLOURS[index % 4]}?"}
        answer = "Yes" if index % 2 else "No"
        rows.append({**row, "answer": answer, "category": "random" if index < 6 else "popular"})
        letters = dict(zip("ABCD", COLOURS, strict=True))
        choices.append({**row, "question": "Which colour?", **letters, "answer": "ABCD"[index % 4]})
    for name in ("POPE_SQUARES", "YES_NO", "POPE"):
        write_table(folder / f"{name}.tsv", rows)
    write_table(folder / "CHOICES.tsv", choices)
    write_table(folder / "BROKEN.tsv", [{**rows[0], "image": "A" * 100}, rows[1]])
    write_table(folder / "OPEN.tsv", [{**row, "answer": "something"} for row in rows])
    given = {row["index"]: row["answer"].lower() if int(row["index"]) < 5 else "perhaps" for row in rows[2:]}
    for name in ("POPE_SQUARES", "YES_NO"):
        (folder / f"{name}.json").write_text(json.dumps(given))
    letters = {row["index"]: row["answer"] if int(row["index"]) < 5 else "none" for row in choices[2:]}
    (folder / "CHOICES.json").write_text(json.dumps(letters))
    return folder


@pytest.fixture(scope="module")
def result(tables, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    pipe = make_pipeline()
    pipe.save_pretrained(home / "mmar")
    out = home / "answer.json"
    script = ROOT / "tests" / "integration" / "vlmevalkit_calls.py"
    done = run_kit(home, script, home / "mmar", tables, home / "work", out, LMUData=str(tables))
    assert done.returncode == 0, done.stderr[-6000:]
    return {**json.loads(out.read_text()), "model": str(home / "mmar")}


@needs_kit
def test_messages_are_read_in_their_order_and_batches_change_nothing(result, tables):
    assert result["batch"] == result["single"] and len(set(result["single"])) > 1
    answerer = MMARAnswerer.from_pretrained(result["model"])
    red, blue = ({"type": "image", "url": str(tables / f"{colour}.png")} for colour in ("red", "blue"))

    def text(value):
        return {"type": "text", "text": value}

    contents = [
        [red, text("Which colour?")],
        [text("Which colour?")],
        [text("Describe"), red, text("and"), blue, text("the image.")],
        [blue, text(str(tables / "red.png"))],
    ]
    chats = [[{"role": "user", "content": content}] for content in contents]
    chats.append(
        [
            {"role": "user", "content": contents[0]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "Describe the image."},
        ]
    )
    assert answerer.answer(chats, max_new_tokens=6) == [*result["single"], result["chat"]]


@needs_kit
def test_what_is_wrong_is_said(result):
    messages = {
        "missing": "an image must be here itself, as base64 or a data URI, or a file in the kit's folder",
        "outside": "an image must be here itself, as base64 or a data URI, or a file in the kit's folder",
        "empty": "a message must have text or a picture; got an empty one.",
        "video": "got type 'video'",
        "option": "got max_tokens. Drop or rename them.",
        "model": "expected an MMAR with processor_config.json, chat template and tokenizer in '",
        "benchmark": "or NO_SUCH.tsv in the kit's folder ($LMUData, or ~/LMUData); got 'NO_SUCH'",
        "offline": "expected the benchmark MMStar; VLMEvalKit cannot load it: Exception: Failed to download",
        "table": "expected a table (NAME.tsv) in VLMEvalKit's layout; there is no file '",
        "name": "'POPE' is a benchmark of the kit. Rename the file, or",
        "picture": "BROKEN, rows with index 0, 1: cannot identify image file",
        "other run": "options changed since. Name another --work_dir",
    }
    for name, message in messages.items():
        assert message in result["refused"][name], name


@needs_kit
def test_prompts_are_ours_where_a_benchmark_has_no_form_of_its_own(result, tables):
    ours = {name for name, is_ours in result["custom"].items() if is_ours}
    assert ours == {"POPE", "MME", "MMStar", "MMMU_DEV_VAL", "MMBench_DEV_CN"}
    assert [item["value"] for item in result["prompts"]["POPE"]] == [
        str(tables / "red.png"),
        "Is it red?\nPlease answer yes or no.",
    ]
    mmmu = [item["value"] for item in result["prompts"]["MMMU_DEV_VAL"]]
    assert mmmu[:2] == ["See ", str(tables / "blue.png")] and mmmu[2].startswith("?\nA. x\nB. y\n")


@needs_kit
def test_a_resumed_run_keeps_its_answers_and_is_scored(result):
    assert all(result["kept"].values())
    assert {name: scored["rows"] for name, scored in result["first"].items()} == dict.fromkeys(result["first"], 2)
    whole = result["whole"]
    # The model's own two answers are noise; rows 2, 3 and 4 were answered rightly: one Yes (3), two No.
    assert whole["YES_NO"]["rows"] == 8 and whole["YES_NO"]["scores"][0]["Overall"] == pytest.approx(37.5)
    overall = {line["split"]: line for line in whole["POPE_SQUARES"]["scores"]}["Overall"]
    assert overall["acc"] == pytest.approx(37.5)
    # One of four Yes found, and none told where it is No: precision 1, recall 1/4.
    assert overall["Overall"] == pytest.approx(40) and overall["precision"] == pytest.approx(100)
    assert whole["CHOICES"]["scores"][0]["Overall"] == pytest.approx(3 / 8)
    # Open answers are kept; the kit has no score for them.
    assert whole["OPEN"]["rows"] == 8 and whole["OPEN"]["scores"] is None


@needs_kit
def test_the_kits_own_command_runs_a_registered_model(tables, result, tmp_path):
    code = (
        "from mmar.evaluation.vlmevalkit_adapter import register\n"
        f"register('squares', {result['model']!r}, max_new_tokens=4)\n"
        "from vlmeval.run import main\nmain()\n"
    )
    script = tmp_path / "own.py"
    script.write_text(code)
    arguments = ["--data", "CHOICES", "--model", "squares", "--work-dir", tmp_path / "own", "--limit", "3"]
    arguments += ["--judge", "exact_matching"]
    # Its own format of predictions, Excel, needs more packages.
    done = run_kit(tmp_path, script, *arguments, LMUData=str(tables), PRED_FORMAT="tsv")
    scores = list((tmp_path / "own").rglob("squares_CHOICES_acc.csv"))
    assert done.returncode == 0 and len(scores) == 1, done.stderr[-6000:]
    predictions = list((tmp_path / "own").rglob("squares_CHOICES.tsv"))
    assert len(predictions[0].read_text().splitlines()) == 4


@needs_kit
@pytest.mark.skipif(not VQA_MINI.is_dir(), reason="needs the small benchmarks of shared/")
def test_the_bundled_model_on_real_benchmarks(tmp_path):
    names = ["POPE_MINI", "NLVR1_TEST_MINI", "GROCERY_MCQ_TEST"]
    arguments = ["checkpoints/mmar-tiny"]
    for name in names:
        arguments += ["--data", VQA_MINI / f"{name}.tsv"]
    arguments += ["--work_dir", tmp_path / "work", "--limit", 4, "--batch_size", 4, "--max_new_tokens", 12]
    done = run_kit(tmp_path, "mmar", "evaluate", "vlmevalkit", *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    for name in names:
        folder = tmp_path / "work" / "mmar-tiny" / name
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()[1:]]
        scored = json.loads((folder / "result.json").read_text())
        assert len(answers) == scored["rows"] == 4 and any(line["answer"] for line in answers)
        assert 0 <= scored["scores"][0]["Overall"] <= 100
        assert list(folder.glob(f"mmar-tiny_{name}_*.csv"))


@pytest.mark.skipif(KITS is not None or importlib.util.find_spec("vlmeval") is not None, reason="VLMEvalKit is here")
def test_without_the_kit_the_adapter_says_how_to_install_it():
    done = subprocess.run(
        [sys.executable, "-m", "mmar", "evaluate", "vlmevalkit", "model", "--data", "POPE", "--work-dir", "work"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "ModuleNotFoundError" in done.stderr
    assert "`pip install ms-vlmeval`" in done.stderr
    with pytest.raises(ImportError, match="evaluation.md"):
        importlib.import_module("mmar.evaluation.vlmevalkit_adapter")
    with pytest.raises(ImportError, match="`pip install lmms-eval`"):
        importlib.import_module("mmar.evaluation.lmms_eval_plugin")

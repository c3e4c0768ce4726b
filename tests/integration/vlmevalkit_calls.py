"""What `test_vlmevalkit.py` asks of the adapter in a process of the kit: `MODEL TABLES WORK_DIR ANSWER.json`."""

import copy
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from mmar.evaluation.vlmevalkit_adapter import MMARForVLMEvalKit
from mmar_cli import app


def text(value):
    return {"type": "text", "value": value}


def image(path):
    return {"type": "image", "value": str(path)}


def refusal(call, *arguments):
    try:
        return f"not refused: {call(*arguments)!r}"
    except ValueError as error:
        return str(error)


def command(*arguments):
    """What the adapter's command prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        app(["evaluate", "vlmevalkit", *map(str, arguments)], standalone_mode=False)
    return json.loads(printed.getvalue()[printed.getvalue().index('{\n "command"') :])


def main():
    folder, tables, work, out = map(Path, sys.argv[1:])
    red, blue = tables / "red.png", tables / "blue.png"
    outside = work.parent / "outside.png"
    outside.write_bytes(red.read_bytes())
    model = MMARForVLMEvalKit(str(folder), batch_size=3, max_new_tokens=6)
    messages = [
        [image(red), text("Which colour?")],
        [text("Which colour?")],
        [text("Describe"), image(red), text("and"), image(blue), text("the image.")],
        # A text that is a file's name stays a text.
        [image(blue), text(str(red))],
    ]
    turns = [
        {"role": "user", "content": [image(red), text("Which colour?")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Describe the image."},
    ]
    result = {
        "single": [model.generate(copy.deepcopy(message)) for message in messages],
        "batch": model.generate_batch(messages),
        "chat": model.chat(copy.deepcopy(turns)),
        "refused": {
            "missing": refusal(model.generate, [image(tables / "no.png"), text("?")]),
            "outside": refusal(model.generate_batch, [[image(outside)]]),
            "empty": refusal(model.generate, []),
            "video": refusal(model.generate, [{"type": "video", "value": "a.mp4"}]),
            "option": refusal(lambda: MMARForVLMEvalKit(str(folder), max_tokens=3)),
            "model": refusal(MMARForVLMEvalKit, str(tables)),
            "benchmark": refusal(command, folder, "--data", "NO_SUCH", "--work_dir", work),
            "offline": refusal(command, folder, "--data", "MMStar", "--work_dir", work),
            "table": refusal(command, folder, "--data", tables / "NO.tsv", "--work_dir", work),
            "name": refusal(command, folder, "--data", tables / "POPE.tsv", "--work_dir", work),
            "picture": refusal(command, folder, "--data", tables / "BROKEN.tsv", "--work_dir", work),
        },
        "custom": {
            name: model.use_custom_prompt(name)
            for name in ("POPE", "MME", "MMStar", "MMMU_DEV_VAL", "MMBench_DEV_CN", "TextVQA_VAL", "MathVista_MINI")
        },
    }
    model.set_dump_image(lambda line: line["image_path"])
    mmmu = {"question": "See <image 2>?", "image_path": [str(red), str(blue)], "A": "x", "B": "y"}
    result["prompts"] = {
        "MMMU_DEV_VAL": model.build_prompt(mmmu, "MMMU_DEV_VAL"),
        "POPE": model.build_prompt({"question": "Is it red?", "image_path": [str(red)]}, "POPE"),
    }

    # Two rows, then the rest, of which the test gives the right answers as if a killed run had written them.
    arguments = [folder, "--work_dir", work, "--name", "squares", "--max_new_tokens", 6]
    names = ["POPE_SQUARES", "YES_NO", "CHOICES", "OPEN"]
    files = [part for name in names for part in ("--data", tables / f"{name}.tsv")]
    result["first"] = command(*arguments, *files, "--limit", 2)["results"]
    kept = {name: (work / "squares" / name / "answers.jsonl").read_text() for name in names}
    for name in ("POPE_SQUARES", "YES_NO", "CHOICES"):
        right = json.loads((tables / f"{name}.json").read_text())
        with (work / "squares" / name / "answers.jsonl").open("a") as file:
            file.writelines(json.dumps({"index": i, "answer": answer}) + "\n" for i, answer in right.items())
            file.write('{"index": "torn')
    result["whole"] = command(*arguments, *files)["results"]
    result["kept"] = {
        name: (work / "squares" / name / "answers.jsonl").read_text().startswith(kept[name]) for name in names
    }
    arguments[arguments.index(6)] = 5
    result["refused"]["other run"] = refusal(command, *arguments, *files[:2])
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""
Measures an MMAR on held-out emoji-styles cells: exact captions, and pictures for a judge to score.

    python -m mmar.evaluation.emoji_styles checkpoints/mmar-tiny --data checkpoints/emoji-lite/test.parquet \
        --out runs/eval [--judge JUDGE.py]

Rows whose drawing stands in another style in the training rows (`sibling_in_train`) are easier, and those of a skin
tone that their name was seen with in no style (`split` test_tone) harder; they are reported apart. Pictures are
written as PNG files with a `captions.jsonl`, the layout the judge reads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..command import run_command
from ..conversion.models import open_pipeline
from ..pipelines.pipeline_mmar import MMARPipeline
from ..training.emoji_rows import QUESTIONS, read_rows


BATCH_SIZE = 32
# Groups of rows, and what a card says of them.
GROUPS = {
    "sibling": ", same drawing seen in another style",
    "no_sibling": ", drawing never seen",
    "tone": ", skin tone never seen with this name",
}
# What a card tells of the judge's figures.
JUDGE_FIGURES = {
    "name_top1": "drawings that the judge names as asked",
    "name_top5": "drawings whose name is among the judge's first five",
    "style": "drawings in the asked style, by the judge",
    "frechet": "Frechet distance of the judge's features",
    "frechet_real": "the same distance of as many real training pictures",
    "copies": "drawings that copy a training picture",
}


def chat_about(picture: Any, question: str) -> list[dict[str, Any]]:
    """The chat that asks a question about a picture."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


@torch.no_grad()
def ask(pipe: MMARPipeline, pictures: list[Any], question: str) -> list[str]:
    r"""
    Asks one question about each picture, greedily decoded.

    Args:
        pipe (`MMARPipeline`): Model and processor.
        pictures (`list[PIL.Image.Image]`): Pictures.
        question (`str`): The question.

    Returns:
        `list[str]`: One answer per picture.
    """
    answers = []
    for start in range(0, len(pictures), BATCH_SIZE):
        chats = [chat_about(picture, question) for picture in pictures[start : start + BATCH_SIZE]]
        inputs = pipe.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        ).to(pipe.device)
        generated = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=32)
        answers += pipe.processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def group_of(row: dict[str, Any]) -> str:
    """Which of `GROUPS` a row is in."""
    if row.get("split") == "test_tone":
        return "tone"
    return "sibling" if row["sibling_in_train"] else "no_sibling"


def by_group(rows: list[dict[str, Any]], hits: list[bool]) -> dict[str, float]:
    """Share of hits over all rows and over those of each group."""
    groups = {"all": hits}
    for name in GROUPS:
        groups[name] = [hit for row, hit in zip(rows, hits, strict=True) if group_of(row) == name]
    return {name: round(sum(group) / len(group), 4) for name, group in groups.items() if group}


def score_captions(pipe: MMARPipeline, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Exact match of the answers to the three questions."""
    pictures = pipe.processor.image_processor.fetch_images([row["image"] for row in rows], places=False)
    scores = {}
    for name, question in QUESTIONS.items():
        expected = [row["answers"][row["questions"].index(question)] for row in rows]
        answers = ask(pipe, pictures, question)
        scores[name] = by_group(rows, [a == e for a, e in zip(answers, expected, strict=True)])
    return scores


def draw(pipe: MMARPipeline, rows: list[dict[str, Any]], out: Path, seed: int, **kwargs) -> float:
    """Draws each row's caption into `out`; returns the seconds per picture."""
    out.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    started, lines = time.perf_counter(), []
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="drawing"):
        batch = rows[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        prompts = [row["captions"][0] for row in batch]
        for i, image in enumerate(pipe(prompts, generator=generators, **kwargs).images):
            file = f"{start + i:05d}.png"
            image.save(out / file)
            lines.append({"file": file, "label": batch[i]["label"], "style": batch[i]["style"]})
    (out / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (time.perf_counter() - started) / len(rows)


def judge(script: Path, pictures: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the judge on all pictures, and on those of each group."""
    lines = (pictures / "captions.jsonl").read_text().splitlines()
    scores = {}
    for name in ("all", *GROUPS):
        kept = [i for i, row in enumerate(rows) if name in ("all", group_of(row))]
        if len(kept) < 2:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for i in kept:
                file = json.loads(lines[i])["file"]
                (Path(folder) / file).write_bytes((pictures / file).read_bytes())
            (Path(folder) / "captions.jsonl").write_text("".join(lines[i] + "\n" for i in kept))
            done = subprocess.run([sys.executable, str(script), folder], stdout=subprocess.PIPE, text=True, check=True)
        scores[name] = json.loads(done.stdout)
    return scores


def card_metrics(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a result as `make_model_card` reads them."""
    groups = {"all": "", **GROUPS}
    metrics = []
    for name in QUESTIONS:
        for group, words in groups.items():
            if group in result["captions"][name]:
                answer = "name and style" if name == "caption" else name
                metrics.append(
                    {
                        "task": "image-to-text",
                        "type": "exact_match",
                        "name": f"{answer} answered exactly{words}",
                        "value": result["captions"][name][group],
                    }
                )
    for group, scores in result.get("judge", {}).items():
        for key, words in JUDGE_FIGURES.items():
            if key in scores:
                name = f"{words}{groups[group]}"
                metrics.append({"task": "text-to-image", "type": key, "name": name, "value": scores[key]})
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an MMAR")
    parser.add_argument("--data", required=True, type=Path, help="parquet of held-out rows")
    parser.add_argument("--out", required=True, type=Path, help="folder for pictures and result.json")
    parser.add_argument("--judge", type=Path, help="script that scores a folder of pictures")
    parser.add_argument("--num_rows", type=int, help="so many rows, spread over the file; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--num_ar_steps", type=int)
    parser.add_argument("--num_inference_steps", type=int)
    args = parser.parse_args()

    rows = read_rows(args.data)
    if args.num_rows is not None:
        if not 1 <= args.num_rows <= len(rows):
            parser.error(f"--num_rows must be between 1 and {len(rows)}, the rows of {args.data.name}")
        rows = [rows[i * len(rows) // args.num_rows] for i in range(args.num_rows)]
    if missing := {"label", "style", "sibling_in_train"} - rows[0].keys():
        parser.error(f"{args.data.name} must have the columns {', '.join(sorted(missing))} too")
    if args.judge is not None and not args.judge.is_file():
        parser.error(f"--judge must be a script; {args.judge} is not there")
    pipe = open_pipeline(args.model)
    options = {name: getattr(args, name) for name in ("guidance_scale", "num_ar_steps", "num_inference_steps")}
    given = {"num_rows": args.num_rows, "seed": args.seed, **options}
    result: dict[str, Any] = {"rows": len(rows), "options": options, "captions": score_captions(pipe, rows)}
    pictures = args.out / "pictures"
    result["seconds_per_picture"] = round(draw(pipe, rows, pictures, args.seed, **options), 3)
    result["command"] = f"python -m mmar.evaluation.emoji_styles {args.model} --data {args.data} --out {args.out}"
    result["command"] += "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
    dataset = args.data.resolve().parent.name
    result["dataset"] = {"type": dataset, "name": dataset, "split": args.data.stem}
    result["metrics"] = card_metrics(result)
    # Kept, should the judge fail.
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.judge is not None:
        result["command"] += f" --judge {args.judge.name}"
        result["judge"] = judge(args.judge, pictures, rows)
        result["metrics"] = card_metrics(result)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command(main)

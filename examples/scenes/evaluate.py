"""
Measures a model on scenes: what it says of images, and what it generates from captions.

    python -m examples.scenes.evaluate checkpoints/mmar-tiny --out runs/scenes/evaluation

Every figure is given for what the training has seen and for each kind of composition that was held out of it. Answers
are parsed to facts, so that every right wording counts; images are judged by matching glyphs (judge.py).
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmar import MMARPipeline
from mmar.command import run_command

from .judge import Score, find, score
from .texts import DESCRIBE, LIST, Facts, Thing, agrees, all_facts, description, parse, question, words_of
from .world import IMAGE_SIZE, Mix, Scene, held_out, render, sample_scene


TEST_SEED = 1_000_001
# What compositions are new in a scene; "seen" are those of training, in new scenes.
NOVELTIES = ("seen", "color", "count", "relation")
# GenEval's categories, and captions that say everything.
CATEGORIES = ("one object", "two objects", "counting", "colors", "position", "attribution", "full")
# The reasons for which the scenes behind a category's captions are held out.
NEW_IN = {
    "one object": (),
    "two objects": ("color", "relation"),
    "counting": ("count",),
    "colors": ("color",),
    "position": ("relation",),
    "attribution": ("color",),
    "full": ("color", "count", "relation"),
}
OPEN_CAPTION = "two fish"
NUM_OPEN = 64


def scene_with(novelty: str, number: int, mix: Mix, is_fitting=lambda scene: True) -> Scene:
    """A test scene that is held out for just this reason, or seen; the same for the same number."""
    generator = np.random.default_rng([TEST_SEED, NOVELTIES.index(novelty), number])
    wanted = set() if novelty == "seen" else {novelty}
    while True:
        scene = sample_scene(generator, mix)
        if held_out(scene) == wanted and is_fitting(scene):
            return scene


# Reading


def ask(pipe: MMARPipeline, images: list[Image.Image], questions: list[str], batch_size: int) -> list[str]:
    """The model's answers, by greedy decoding."""
    answers = []
    for start in range(0, len(images), batch_size):
        part = zip(images[start : start + batch_size], questions[start : start + batch_size], strict=True)
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": asked}]}]
            for image, asked in part
        ]
        inputs = pipe.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        written = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in pipe.processor.batch_decode(written, skip_special_tokens=True)]
    return answers


def kind_of_question(asked: str) -> str:
    """A name for the questions of one kind, for reports."""
    if asked in (DESCRIBE, LIST):
        return "describe" if asked == DESCRIBE else "list"
    if "background" in asked:
        return "background"
    if asked.startswith("What is"):
        return "relation"
    return {"What": "color", "How": "count", "Where": "where", "Is": "exists"}[asked.split()[0]]


def is_right(scene: Scene, asked: str, expected: str, answer: str) -> bool:
    """Whether an answer says the right thing, in whatever wording."""
    if asked == DESCRIBE:
        return agrees(parse(answer), scene, is_complete=True)
    said, true = parse(answer), parse(expected)
    if true is None or asked.startswith(("Is", "How")):
        return answer.lower().rstrip(".") == expected.lower()
    # A list of things, in any order.
    return said is not None and set(said.things) == set(true.things)


def read(pipe: MMARPipeline, num_scenes: int, batch_size: int) -> dict[str, Any]:
    """Shares of right descriptions and of right answers, by novelty."""
    report: dict[str, Any] = {"descriptions": {}, "questions": {}, "by_kind": {}}
    by_kind = defaultdict(list)
    for novelty in NOVELTIES:
        scenes = [scene_with(novelty, number, Mix()) for number in range(num_scenes)]
        generators = [np.random.default_rng([TEST_SEED + 1, number]) for number in range(num_scenes)]
        pairs = []
        for scene, generator in zip(scenes, generators, strict=True):
            while (pair := question(scene, generator))[0] == DESCRIBE:
                pass
            pairs.append(pair)
        images = [Image.fromarray(render(scene)) for scene in scenes]
        described = ask(pipe, images, [DESCRIBE] * num_scenes, batch_size)
        answers = ask(pipe, images, [asked for asked, _ in pairs], batch_size)
        right = [is_right(s, DESCRIBE, description(s), text) for s, text in zip(scenes, described, strict=True)]
        report["descriptions"][novelty] = float(np.mean(right))
        right = []
        for scene, (asked, expected), answer in zip(scenes, pairs, answers, strict=True):
            right.append(is_right(scene, asked, expected, answer))
            by_kind[kind_of_question(asked)].append(right[-1])
        report["questions"][novelty] = float(np.mean(right))
    report["by_kind"] = {kind: float(np.mean(values)) for kind, values in sorted(by_kind.items())}
    return report


# Generating


def asked_facts(category: str, number: int, novelty: str) -> Facts:
    """What a caption of a category asks for; it is held out for the reason `novelty`, or seen."""
    mixes = {"one object": Mix(1, 0, 0), "colors": Mix(1, 0, 0), "counting": Mix(0, 1, 0), "full": Mix()}
    mix = mixes.get(category, Mix(0, 0, 1))

    def is_fitting(scene: Scene) -> bool:
        return category not in ("two objects", "attribution", "position") or all(g.count == 1 for g in scene.groups)

    scene = scene_with(novelty, number + 10_000 * CATEGORIES.index(category), mix, is_fitting)
    facts = all_facts(scene)
    says_color = category in ("colors", "attribution", "full")
    if category == "full":
        return parse(words_of(facts))
    things = tuple(Thing(thing.kind, thing.count, thing.color if says_color else None) for thing in facts.things)
    return Facts(things, facts.relation if category == "position" else None)


def is_fulfilled(category: str, verdict: Score) -> bool:
    """Whether an image shows what its category asks for: as GenEval, whatever else is right or wrong in it."""
    if category == "full":
        return verdict.all_right
    names = {"counting": "counts", "colors": "colors", "position": "relation", "attribution": "colors"}
    counts = verdict.counts is not False
    return verdict.kinds and counts and getattr(verdict, names.get(category, "kinds")) is True


def generate(pipe: MMARPipeline, captions: list[str], first_seed: int, batch_size: int, **options) -> np.ndarray:
    """Images of captions `(M, 64, 64, 3)`, 8 bits; each has its own seed."""
    made = []
    for start in range(0, len(captions), batch_size):
        part = captions[start : start + batch_size]
        seeds = range(first_seed + start, first_seed + start + len(part))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(part, generator=generators, output_type="pil", **options).images
        made += [np.asarray(image) for image in images]
    return np.stack(made)


def write(pipe: MMARPipeline, num_captions: int, batch_size: int, out: Path, **options) -> dict[str, Any]:
    """Shares of images that fulfil their captions, by category and novelty."""
    report: dict[str, Any] = {}
    for category in CATEGORIES:
        own = {}
        for novelty in ("seen", *NEW_IN[category]):
            asked = [asked_facts(category, number, novelty) for number in range(num_captions)]
            captions = [words_of(facts) for facts in asked]
            images = generate(pipe, captions, 0, batch_size, **options)
            verdicts = [score(image, facts) for image, facts in zip(images, asked, strict=True)]
            own[novelty] = float(np.mean([is_fulfilled(category, verdict) for verdict in verdicts]))
            own[f"{novelty}, all right"] = float(np.mean([verdict.all_right for verdict in verdicts]))
            save_sheet(out / f"{category.replace(' ', '_')}_{novelty}.png", images[:64])
        report[category] = own
    return report


def save_sheet(path: Path, images: np.ndarray, columns: int = 8, scale: int = 2) -> None:
    """Images next to each other, enlarged."""
    missing = -len(images) % columns
    images = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)])
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def num_layouts(images: np.ndarray) -> int:
    """How many different arrangements of glyphs a set of images has."""
    return len({tuple(sorted((g.kind, g.corner) for g in find(image).glyphs)) for image in images})


# Distances of sets


def features(images: np.ndarray) -> np.ndarray:
    """
    Fixed features `(M, 256)` of images `(M, 64, 64, 3)`: means of the three colors, and of the edges' strength, in
    each of 8 x 8 squares, in [0, 1].
    """
    pixels = images.astype(np.float64) / 255
    steps = [np.diff(pixels, axis=axis, append=np.take(pixels, [-1], axis=axis)) for axis in (1, 2)]
    edges = np.abs(steps[0]) + np.abs(steps[1])
    channels = np.concatenate([pixels, edges.mean(-1, keepdims=True)], axis=-1)
    size = IMAGE_SIZE // 8
    return channels.reshape(len(images), 8, size, 8, size, 4).mean(axis=(2, 4)).reshape(len(images), -1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the normal distributions with the features' means and covariances."""
    means = [part.mean(0) for part in (first, second)]
    covariances = [torch.from_numpy(np.cov(part, rowvar=False)) for part in (first, second)]
    # The trace of the root of a product of covariances is the sum of the roots of its eigenvalues.
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0)
    traces = sum(covariance.trace() for covariance in covariances)
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * eigenvalues.sqrt().sum())


def distances(pipe: MMARPipeline, num_images: int, batch_size: int, **options) -> dict[str, float]:
    """Frechet distance of generated images of training captions to real ones, and of two sets of real ones."""
    scenes = [scene_with("seen", 50_000 + number, Mix()) for number in range(2 * num_images)]
    real = np.stack([render(scene) for scene in scenes])
    captions = [words_of(all_facts(scene)) for scene in scenes[:num_images]]
    made = generate(pipe, captions, 500_000, batch_size, **options)
    return {
        "generated": frechet_distance(features(made), features(real[num_images:])),
        "real": frechet_distance(features(real[:num_images]), features(real[num_images:])),
        "all_right": float(np.mean([score(i, all_facts(s)).all_right for i, s in zip(made, scenes, strict=False)])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num_read", type=int, default=250, help="scenes to read, for each kind of novelty")
    parser.add_argument("--num_captions", type=int, default=100, help="captions of each category and novelty")
    parser.add_argument("--num_distance", type=int, default=2000, help="images of the Frechet distance; 0: none")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--num_ar_steps", type=int)
    parser.add_argument("--num_inference_steps", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = MMARPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = ("guidance_scale", "num_ar_steps", "num_inference_steps")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    begin = time.monotonic()
    report: dict[str, Any] = {"model": args.model, **options}
    report["reading"] = read(pipe, args.num_read, args.batch_size)
    print(json.dumps(report["reading"], indent=1), flush=True)
    report["generating"] = write(pipe, args.num_captions, args.batch_size, args.out, **options)
    images = generate(pipe, [OPEN_CAPTION] * NUM_OPEN, 900_000, args.batch_size, **options)
    save_sheet(args.out / "open.png", images)
    report["layouts"] = num_layouts(images)
    if args.num_distance > 0:
        report["distance"] = distances(pipe, args.num_distance, args.batch_size, **options)
    report["seconds"] = time.monotonic() - begin
    (args.out / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main)

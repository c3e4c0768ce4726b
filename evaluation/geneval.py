"""
GenEval (arXiv 2310.11513): pictures of its prompts in the layout that its scorer reads, and the table of its results.

    mmar evaluate geneval draw MODEL --metadata evaluation_metadata.jsonl --out runs/geneval
    torchrun --nproc_per_node 8 -m mmar evaluate geneval draw MODEL ...
    python evaluation/evaluate_images.py runs/geneval --outfile results.jsonl ...     # GenEval's own, on a GPU
    mmar evaluate geneval scores results.jsonl

A line of the metadata has `prompt` and `tag`, and what should be seen. For line 7, counted from 0, the folder holds
00007/metadata.jsonl and 00007/samples/0000.png to 0003.png. A run that was stopped is started again with the same
words and goes on where it was.
"""

from pathlib import Path
from typing import Any

from ..modeling_mmar.configuration_mmar import shorten
from .drawing import DrawingOptions, Processes, draw_with, read_lines, spread, write_json, write_lines


# Pictures per prompt, as GenEval and the papers that report it draw.
NUM_SAMPLES = 4


def read_metadata(path: Path) -> list[dict[str, Any]]:
    r"""
    Args:
        path (`Path`): GenEval's evaluation_metadata.jsonl.

    Returns:
        `list[dict]`: Its lines, of which each has a `prompt` and a `tag`.

    Raises:
        ValueError: If it is something else.
    """
    rows = read_lines(path, "GenEval's metadata (a JSON object with `prompt` and `tag` on each line)")
    for place, row in enumerate(rows):
        for name in ("prompt", "tag"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(
                    f"expected a `{name}` in each row of {shorten(str(path))}; row {place} has "
                    f"{shorten(row.get(name))}. Name GenEval's evaluation_metadata.jsonl."
                )
    return rows


def read_scores(path: Path) -> dict[str, Any]:
    r"""
    Sums up what GenEval's scorer found, as its `summary_scores.py` does.

    Args:
        path (`Path`): The scorer's results: on each line `tag`, `metadata` and `correct` of a picture.

    Returns:
        `dict`: `"overall"`, the mean over tags of the share of correct pictures; `"tags"`, of each tag `"correct"`,
        `"pictures"` and `"share"`; `"pictures"` and `"prompts"`, the shares over all of them, a prompt being correct
        if one of its pictures is; `"num_pictures"` and `"num_prompts"`.

    Raises:
        ValueError: If it is something else.
    """
    rows = read_lines(path, "the results of GenEval's scorer (a JSON object on each line)")
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, list[bool]] = {}
    for place, row in enumerate(rows):
        correct = row.get("correct")
        if not isinstance(correct, bool) or not all(isinstance(row.get(name), str) for name in ("tag", "metadata")):
            raise ValueError(
                f"expected `tag`, `metadata` and `correct` (true or false) in each row of {shorten(str(path))}; row "
                f"{place} has {', '.join(sorted(row)) or 'nothing'}. Name the file that evaluate_images.py wrote."
            )
        tags.setdefault(row["tag"], []).append(correct)
        prompts.setdefault(row["metadata"], []).append(correct)
    by_tag = {
        tag: {"correct": sum(hits), "pictures": len(hits), "share": sum(hits) / len(hits)}
        for tag, hits in tags.items()
    }
    return {
        "overall": sum(own["share"] for own in by_tag.values()) / len(by_tag),
        "tags": by_tag,
        "pictures": sum(map(sum, tags.values())) / len(rows),
        "prompts": sum(map(any, prompts.values())) / len(prompts),
        "num_pictures": len(rows),
        "num_prompts": len(prompts),
    }


def table(scores: dict[str, Any]) -> str:
    """The scores as a table in Markdown."""
    lines = ["| tag | correct | pictures | share, % |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {tag} | {own['correct']} | {own['pictures']} | {100 * own['share']:.2f} |"
        for tag, own in scores["tags"].items()
    ]
    lines.append(f"| mean over tags | | {scores['num_pictures']} | {100 * scores['overall']:.2f} |")
    return "\n".join(lines)


def draw(drawing: DrawingOptions, metadata: Path, num_prompts: int | None) -> None:
    r"""
    Draws, and writes the metadata next to the pictures.

    Args:
        drawing (`DrawingOptions`): How.
        metadata (`Path`): GenEval's evaluation_metadata.jsonl.
        num_prompts (`int`, *optional*): So many, spread over the file; all by default.

    Raises:
        ValueError: As `read_metadata`, `spread` and `draw_pictures` raise.
    """
    rows = spread(read_metadata(metadata), num_prompts, "num_prompts")
    processes = Processes.from_environment()
    prompts = {
        f"{place:05d}/samples/{sample:04d}.png": row["prompt"] for place, row in rows for sample in range(NUM_SAMPLES)
    }
    command = drawing.command("evaluate", "geneval", "draw", metadata=metadata, num_prompts=num_prompts)
    draw_with(drawing, prompts, processes, command)
    processes.leave()
    if processes.is_first:
        for place, row in rows:
            write_lines(drawing.out / f"{place:05d}" / "metadata.jsonl", [row])
        print(f"{drawing.out}: {len(prompts)} pictures of {len(rows)} prompts. Next: GenEval's evaluate_images.py.")


def print_scores(results: Path, out: Path | None) -> None:
    """Prints the table of the scorer's results, and writes the scores to a file as JSON if one is named."""
    scores = read_scores(results)
    if out is not None:
        write_json(out, scores)
    print(table(scores))

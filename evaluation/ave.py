"""
AVE@18, the paper's one number for image understanding: the mean over 18 rows of benchmarks (suppl. Table 6).

    mmar evaluate ave runs/vlmevalkit/MODEL     # the result files that VLMEvalKit wrote
    mmar evaluate ave scores.json               # {"AI2D": 43.43, ..., "MME-P": 882.1, ...}

Rows are in percent, but for MME, whose two parts count up to 2000 and 800 points and are divided by 20 and 8.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..modeling_mmar.configuration_mmar import shorten, shorten_names


@dataclass(frozen=True)
class Row:
    r"""
    One row of AVE@18, and where VLMEvalKit writes it.

    Args:
        dataset (`str`): The kit's name of the benchmark and its split.
        file (`str`): What follows the name in the result file's name.
        column (`str`, *optional*, defaults to `"Overall"`): The value's column, or key of a JSON file.
        where (`tuple[str, str]`, *optional*): Column and value that choose the line, if the file has several.
        scale (`float`, *optional*, defaults to 1.0): Brings the kit's value to the paper's.
        maximum (`float`, *optional*, defaults to 100.0): Most points; the row is divided by `maximum / 100`.
    """

    dataset: str
    file: str = "acc.csv"
    column: str = "Overall"
    where: tuple[str, str] | None = None
    scale: float = 1.0
    maximum: float = 100.0


# Multiple choice comes as a share, the rest in percent. The paper does not name splits or figures, but its percentages
# show them: times the size of a split, divided by 100, each of the nine in a row must be a number of answers. So they
# are for the 2,097 questions of ScienceQA_VAL, the 1,164 of MMBench_DEV_EN and MMBench_DEV_CN in version 1.0, the 951
# of HallusionBench's aAcc and the 900 of MMMU's validation split, and not for ScienceQA_TEST (2,017) or MMBench's
# version 1.1, which are therefore not accepted. Ours where nothing shows it: what the kit names "Overall" (F1 for
# POPE).
ROWS = {
    "AI2D": Row("AI2D_TEST", scale=100),
    "ChartQA": Row("ChartQA_TEST"),
    "DocVQA": Row("DocVQA_VAL"),
    "HallusionBench": Row("HallusionBench", "score.csv", "aAcc", ("split", "Overall")),
    "MathVista": Row("MathVista_MINI", "score.csv", "acc", ("Task&Skill", "Overall")),
    "MMBench-CN": Row("MMBench_DEV_CN", scale=100),
    "MMBench-EN": Row("MMBench_DEV_EN", scale=100),
    "MME-P": Row("MME", "score.csv", "perception", maximum=2000),
    "MME-C": Row("MME", "score.csv", "reasoning", maximum=800),
    "MMMU": Row("MMMU_DEV_VAL", where=("split", "validation"), scale=100),
    "MMStar": Row("MMStar", scale=100),
    "MMVet": Row("MMVet", "score.csv", "acc", ("Category", "Overall")),
    "OCRBench": Row("OCRBench", "score.json", "Final Score Norm"),
    "POPE": Row("POPE", "score.csv", where=("split", "Overall")),
    "RealWorldQA": Row("RealWorldQA", scale=100),
    "ScienceQA": Row("ScienceQA_VAL", scale=100),
    "SEEDBench": Row("SEEDBench_IMG", scale=100),
    "TextVQA": Row("TextVQA_VAL"),
}
# Their files name the judge too: MODEL_MMVet_gpt-4-turbo_score.csv.
JUDGED = ("MathVista", "MMVet")


def ave18(scores: dict[str, float]) -> float:
    r"""
    Mean over the 18 rows, MME's parts divided by 20 and 8.

    Args:
        scores (`dict[str, float]`): Row of `ROWS` to score: MME-P in [0, 2000], MME-C in [0, 800], others in percent.

    Returns:
        `float`: AVE@18, in [0, 100].

    Raises:
        ValueError: If a row is missing, unknown, no number, or out of its range.
    """
    if missing := [name for name in ROWS if name not in scores]:
        datasets = ", ".join(dict.fromkeys(ROWS[name].dataset for name in missing))
        raise ValueError(
            f"AVE@18 needs all {len(ROWS)} rows; missing: {', '.join(missing)}. Evaluate {datasets} with VLMEvalKit, "
            "or add their scores."
        )
    if unknown := sorted(set(scores) - set(ROWS)):
        raise ValueError(
            f"AVE@18 has the rows {', '.join(ROWS)}; got {shorten_names(unknown)} too. Drop or rename them."
        )
    for name, score in scores.items():
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not is_number or not 0 <= score <= ROWS[name].maximum:
            raise ValueError(f"{name} must be a number in [0, {ROWS[name].maximum:g}]; got {shorten(score)}.")
    return sum(100 * scores[name] / row.maximum for name, row in ROWS.items()) / len(ROWS)


def _result_files(folder: Path, name: str) -> list[tuple[str, Path]]:
    """Model and path of each result file of a row anywhere below a folder."""
    judge = "(?:_[^_]+)?" if name in JUDGED else ""
    pattern = re.compile(rf"(.+)_{re.escape(ROWS[name].dataset)}{judge}_{re.escape(ROWS[name].file)}")
    # Some versions of the kit link each run's files into the model's folder: one file by two names.
    files = {path.resolve(): path for path in sorted(folder.rglob(f"*_{ROWS[name].file}"), reverse=True)}
    found = [(pattern.fullmatch(path.name), path) for path in reversed(files.values())]
    return [(match[1], path) for match, path in found if match]


def _value(path: Path, row: Row) -> float:
    """A row's value in one result file, as the paper gives it."""
    try:
        if path.suffix == ".json":
            return float(json.loads(path.read_text(encoding="utf-8"))[row.column]) * row.scale
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
        if row.where is not None:
            lines = [line for line in lines if line[row.where[0]] == row.where[1]]
        if len(lines) != 1:
            raise ValueError(f"{len(lines)} lines")
        return float(lines[0][row.column]) * row.scale
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        chosen = "" if row.where is None else f" where {row.where[0]!r} is {row.where[1]!r}"
        raise ValueError(
            f"expected one line with a number in {shorten(row.column)}{chosen} in {shorten(path.name)}; got "
            f"{shorten(error)}. Have VLMEvalKit evaluate the benchmark again."
        ) from error


def read_results(folder: Path) -> dict[str, float]:
    r"""
    Reads what VLMEvalKit wrote about one model.

    Args:
        folder (`Path`): The kit's folder of the model; files may lie in folders of it.

    Returns:
        `dict[str, float]`: Row of `ROWS` to score, of the rows that were found.

    Raises:
        ValueError: If a file cannot be read, a row has several files, or the files are of several models.
    """
    scores, models = {}, {}
    for name, row in ROWS.items():
        files = _result_files(folder, name)
        for model, path in files:
            models.setdefault(model, path)
        if len(models) > 1:
            raise ValueError(
                f"expected the results of one model; got those of {', '.join(sorted(models))}. Name the folder of one."
            )
        if len(files) > 1:
            names = ", ".join(str(path.relative_to(folder)) for _, path in files)
            raise ValueError(f"expected one result file for {name}; got {names}. Move away all but one.")
        if files:
            scores[name] = _value(files[0][1], row)
    return scores


def read_scores(path: Path) -> dict[str, float]:
    r"""
    Reads scores from a folder of result files or a JSON file.

    Args:
        path (`Path`): Folder, see `read_results`, or a JSON file that maps rows to scores.

    Returns:
        `dict[str, float]`

    Raises:
        ValueError: If there is neither, or the file holds something else.
    """
    if path.is_dir():
        return read_results(path)
    if not path.is_file():
        raise ValueError(f"expected a folder of VLMEvalKit's results or a JSON file of scores; {path} is not there.")
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {shorten(path.name)}; it cannot be read: {shorten(error)}.") from error
    if not isinstance(scores, dict):
        raise ValueError(
            f'expected a JSON object such as {{"AI2D": 43.43, ...}} in {shorten(path.name)}; got '
            f"{type(scores).__name__}."
        )
    return scores


def main(results: Path) -> None:
    """Prints AVE@18 and the scores that it is the mean of; raises a `ValueError` as `read_scores` and `ave18` do."""
    scores = read_scores(results)
    average = ave18(scores)
    print(json.dumps({"AVE@18": round(average, 2), "scores": {name: scores[name] for name in ROWS}}, indent=1))

"""AVE@18 against the paper's own table, and from the files that VLMEvalKit writes."""

import csv
import json

import pytest
from commands import mmar

from mmar.evaluation.ave import ROWS, ave18, read_results, read_scores


MODELS = ("Chameleon-7B", "Transfusion*", "Show-o", "MMAR-0.5B", "epsilon", "VQ", "MMAR-7B", "MMAR-7B Stg3", "7B v1")
# Suppl. Table 6; the last column is MMAR-7B in Table 4 of v1.
TABLE = """
AI2D           34.81 40.22  32.48 43.43 41.90 41.90  64.64  63.54  62.63
ChartQA         3.84  9.56  11.32 10.20 10.36  9.36  13.64  12.52  12.72
DocVQA          1.51  6.72  18.24  7.62  6.77  6.79  11.12  10.62  10.28
HallusionBench 39.01 41.54  40.90 42.80 41.11 41.54  53.10  52.05  50.47
MathVista      21.90 22.60  23.20 21.60 23.10 22.90  32.40  31.30  32.10
MMBench-CN     10.14 27.23   0.52 43.99 38.83 31.87  70.53  66.75  66.49
MMBench-EN     13.32 29.47  42.44 48.45 45.53 37.54  70.45  67.78  66.32
MME-P          125.8 594.3 1182.7 882.1 880.7 618.2 1486.9 1421.9 1393.9
MME-C           33.9 206.1  225.0 256.8 232.1 273.2  268.9  303.6  320.0
MMMU           24.00 29.33  26.44 29.33 25.33 29.67  41.33  47.33  42.78
MMStar         20.47 28.13  32.00 32.13 31.07 28.07  41.87  40.87  40.00
MMVet           7.34 13.90  20.87 18.49 17.98 14.45  30.64  29.17  27.80
OCRBench        0.50  2.30  15.20 18.70  7.10  2.10  25.80  21.20  23.10
POPE           30.86 66.90  84.50 70.74 71.14 66.98  84.02  83.21  83.02
RealWorldQA    27.06 36.99  27.97 38.30 35.16 36.60  53.59  52.68  52.42
ScienceQA      44.83 45.92  41.82 47.54 45.21 45.35  74.39  73.20  71.05
SEEDBench      34.61 42.40  51.61 55.70 53.72 44.93  68.63  66.59  64.52
TextVQA         5.43  9.94  38.35 16.77 12.40  9.46  24.37  21.35  22.05
"""
AVERAGES = (18.34, 28.26, 33.06, 34.56, 32.21, 29.70, 48.25, 47.18, 46.52)


def scores_of(column):
    rows = [line.split() for line in TABLE.strip().splitlines()]
    return {name: float(values[column]) for name, *values in rows}


@pytest.mark.parametrize(("column", "average"), list(enumerate(AVERAGES)), ids=MODELS)
def test_the_papers_averages(column, average):
    # The table rounds its averages to two decimals.
    assert ave18(scores_of(column)) == pytest.approx(average, abs=0.005 + 1e-9)


def test_missing_unknown_and_impossible_scores_are_refused():
    scores = scores_of(3)
    missing = {name: score for name, score in scores.items() if name not in ("MMVet", "MME-C")}
    with pytest.raises(ValueError, match="MME-C, MMVet"):
        ave18(missing)
    with pytest.raises(ValueError, match="MMB"):
        ave18({**scores, "MMB": 48.45})
    for name, wrong in (("POPE", 100.1), ("MME-P", 2000.5), ("AI2D", float("nan")), ("AI2D", "43"), ("AI2D", True)):
        with pytest.raises(ValueError, match=name):
            ave18({**scores, name: wrong})


def test_a_score_may_be_nothing_or_all_of_its_points():
    assert ave18(dict.fromkeys(ROWS, 0)) == 0
    assert ave18({name: row.maximum for name, row in ROWS.items()}) == pytest.approx(100)


SIZES = {"ScienceQA": 2097, "MMBench-EN": 1164, "MMBench-CN": 1164, "HallusionBench": 951, "MMMU": 900}


def is_share_of(percent, size):
    """Whether a percentage of two decimals is a number of answers, out of so many."""
    return round(100 * round(percent * size / 100) / size, 2) == percent


def test_the_papers_splits_are_those_that_give_whole_numbers_of_answers():
    columns = [scores_of(column) for column in range(len(MODELS))]
    for name, size in SIZES.items():
        assert all(is_share_of(scores[name], size) for scores in columns), name
    # Neither ScienceQA's test split nor what MMMU and HallusionBench have besides.
    for name, size in (("ScienceQA", 2017), ("MMMU", 1050), ("HallusionBench", 1129)):
        assert not all(is_share_of(scores[name], size) for scores in columns), name


@pytest.mark.parametrize(
    ("name", "ours", "other"),
    [
        ("MMBench-EN", "MMBench_DEV_EN", "MMBench_DEV_EN_V11"),
        ("MMBench-CN", "MMBench_DEV_CN", "MMBench_DEV_CN_V11"),
        ("MMBench-EN", "MMBench_DEV_EN", "MMBench_TEST_EN"),
        ("ScienceQA", "ScienceQA_VAL", "ScienceQA_TEST"),
    ],
)
def test_other_splits_are_not_taken_for_the_papers(tmp_path, name, ours, other):
    write_results(tmp_path, scores_of(6))
    (path,) = tmp_path.rglob(f"*_{ours}_acc.csv")
    path.rename(path.with_name(path.name.replace(ours, other)))
    scores = read_results(tmp_path)
    assert name not in scores
    with pytest.raises(ValueError, match=f"{name}.*{ours}"):
        ave18(scores)


def write_csv(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(lines)


def write_results(folder, scores, model="mmar-7b"):
    """The result files of a model as VLMEvalKit lays them out."""
    shares = {
        "AI2D": "AI2D_TEST",
        "MMBench-CN": "MMBench_DEV_CN",
        "MMBench-EN": "MMBench_DEV_EN",
        "MMStar": "MMStar",
        "RealWorldQA": "RealWorldQA",
        "ScienceQA": "ScienceQA_VAL",
        "SEEDBench": "SEEDBench_IMG",
    }
    for name, dataset in shares.items():
        # In folders of their own, as `vlmevalkit_adapter` writes them.
        line = {"split": "dev", "Overall": scores[name] / 100, "AR": 0.5}
        write_csv(folder / dataset / f"{model}_{dataset}_acc.csv", line)
    for name, dataset in {"ChartQA": "ChartQA_TEST", "DocVQA": "DocVQA_VAL", "TextVQA": "TextVQA_VAL"}.items():
        write_csv(folder / f"{model}_{dataset}_acc.csv", {"Overall": scores[name]})
    write_csv(
        folder / f"{model}_MMMU_DEV_VAL_acc.csv",
        {"split": "dev", "Overall": 0.9},
        {"split": "validation", "Overall": scores["MMMU"] / 100},
    )
    write_csv(
        folder / f"{model}_HallusionBench_score.csv",
        {"split": "Overall", "aAcc": scores["HallusionBench"], "fAcc": 1.0, "qAcc": 2.0},
        {"split": "VD", "aAcc": 3.0, "fAcc": 4.0, "qAcc": 5.0},
    )
    write_csv(
        folder / f"{model}_MME_score.csv", {"perception": scores["MME-P"], "reasoning": scores["MME-C"], "OCR": 70}
    )
    write_csv(
        folder / f"{model}_POPE_score.csv",
        {"split": "Overall", "Overall": scores["POPE"], "acc": 50.0},
        {"split": "random", "Overall": 1.0, "acc": 2.0},
    )
    # Another benchmark, which is not POPE judged by "MINI".
    write_csv(folder / f"{model}_POPE_MINI_score.csv", {"split": "Overall", "Overall": 1.0})
    write_csv(
        folder / f"{model}_MathVista_MINI_gpt-4o-mini_score.csv",
        {"Task&Skill": "Overall", "tot": 1000, "acc": scores["MathVista"]},
        {"Task&Skill": "algebraic", "tot": 281, "acc": 1.0},
    )
    write_csv(
        folder / f"{model}_MMVet_gpt-4-turbo_score.csv",
        {"Category": "rec", "tot": 187, "acc": 1.0},
        {"Category": "Overall", "tot": 218, "acc": scores["MMVet"]},
    )
    final = {"Final Score": 10 * scores["OCRBench"], "Final Score Norm": scores["OCRBench"]}
    (folder / f"{model}_OCRBench_score.json").write_text(json.dumps(final))


def test_result_files_of_vlmevalkit(tmp_path, capsys):
    expected = scores_of(6)
    write_results(tmp_path, expected)
    # As a spreadsheet saves it: with a byte order mark.
    chart = tmp_path / "mmar-7b_ChartQA_TEST_acc.csv"
    chart.write_text(chart.read_text(), encoding="utf-8-sig")
    assert read_results(tmp_path) == pytest.approx(expected, rel=1e-12)
    mmar("evaluate", "ave", tmp_path)
    assert json.loads(capsys.readouterr().out)["AVE@18"] == 48.25


def test_links_of_the_kit_are_the_files_that_they_name(tmp_path):
    expected = scores_of(6)
    run = tmp_path / "mmar-7b" / "T20250101_G0a1b2c3"
    write_results(run, expected)
    for path in [path for path in run.rglob("*") if path.is_file()]:
        (tmp_path / "mmar-7b" / path.name).symlink_to(path)
    assert read_results(tmp_path / "mmar-7b") == pytest.approx(expected, rel=1e-12)


def test_what_is_missing_twice_or_broken_is_named(tmp_path):
    write_results(tmp_path, scores_of(6))
    (tmp_path / "mmar-7b_OCRBench_score.json").unlink()
    (tmp_path / "MMStar" / "mmar-7b_MMStar_acc.csv").unlink()
    with pytest.raises(ValueError, match="MMStar, OCRBench"):
        ave18(read_results(tmp_path))
    write_csv(tmp_path / "mmar-7b_MMBench_DEV_EN_acc.csv", {"split": "dev", "Overall": 0.5})
    with pytest.raises(ValueError, match="MMBench_DEV_EN"):
        read_results(tmp_path)
    (tmp_path / "mmar-7b_MMBench_DEV_EN_acc.csv").unlink()
    write_csv(tmp_path / "mmar-7b_TextVQA_VAL_acc.csv", {"overall": 5})
    with pytest.raises(ValueError, match="'Overall'"):
        read_results(tmp_path)
    write_csv(tmp_path / "mmar-7b_TextVQA_VAL_acc.csv", {"Overall": 5}, {"Overall": 6})
    with pytest.raises(ValueError, match="mmar-7b_TextVQA_VAL_acc.csv"):
        read_results(tmp_path)
    write_csv(tmp_path / "other_AI2D_TEST_acc.csv", {"split": "none", "Overall": 0.5})
    with pytest.raises(ValueError, match="mmar-7b, other"):
        read_results(tmp_path)


def test_scores_from_json(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores_of(2)))
    assert ave18(read_scores(path)) == pytest.approx(33.06, abs=0.005)
    for text, message in (("{", "scores.json"), ("[1]", "list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_scores(path)
    with pytest.raises(ValueError, match="there"):
        read_scores(tmp_path / "none")

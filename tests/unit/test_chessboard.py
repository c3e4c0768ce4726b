"""The chessboard experiment: its data, what counts as an error, and a run that a test can afford."""

import sys
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from helpers import seeded

from mmar.ablations import chessboard
from mmar.ablations.chessboard import MARGIN, distances, fields_of, sample_board


def test_fields_of_quadrants():
    middles = torch.cat([fields_of(label) for label in range(4)])
    # Half of 64 fields, each once, on a board from -2 to 2.
    assert len(middles) == 32 == len(middles.unique(dim=0)) and float(middles.abs().max()) == 1.75
    left_below, right_above = fields_of(0), fields_of(3)
    assert (left_below < 0).all() and (right_above > 0).all()
    # Neighbours along a row or column are a field apart: a chessboard has no two black ones.
    away = (middles[:, None] - middles).abs().sum(-1) + 9 * torch.eye(32)
    assert float(away.min()) == 1.0


def test_samples_lie_on_their_fields():
    labels = torch.randint(0, 4, (4000,), generator=seeded(0))
    points = sample_board(labels, seeded(1))
    assert float(distances(points, labels).max()) == 0
    # Other classes' points are errors, but for those of a neighbouring field's edge.
    assert (distances(points, (labels + 1) % 4) > MARGIN).float().mean() > 0.9
    assert 0.9 < float(points.std()) < 1.4


def test_distances_by_hand():
    middle = fields_of(2)[0]
    points = torch.stack([middle, middle + torch.tensor([0.25, 0.0]), middle + torch.tensor([-9.0, 0.0])])
    points = torch.cat([points, torch.full((1, 2), float("nan"))])
    away = distances(points, torch.full((4,), 2))
    assert away[0] == 0 and float(away[1]) == pytest.approx(0, abs=1e-6) and away[2] > 6
    assert away[3] == float("inf")


def short_run(monkeypatch, work, prediction_type, dtype):
    monkeypatch.setattr(chessboard, "BATCH_SIZE", 256)
    # Over fewer steps.
    monkeypatch.setattr(chessboard, "EMA_DECAY", 0.95)
    return chessboard.run(work, prediction_type, dtype, 0, 300, 1000, 20)


def test_v_learns_the_board_in_a_short_run(monkeypatch, tmp_path):
    outcome, points, wrong = short_run(monkeypatch, tmp_path, "v_prediction", "bfloat16")
    # Even points on the whole board would be errors in more than half of the cases, and nothing strays off it.
    assert outcome.num_errors < 150 and outcome.largest < 3.5
    assert outcome.num_samples == 1000 == len(points) == len(wrong) and int(wrong.sum()) == outcome.num_errors
    for work in (tmp_path, tmp_path / "anew"):
        again, points_again, _ = short_run(monkeypatch, work, "v_prediction", "bfloat16")
        assert again.loss == outcome.loss and torch.equal(points_again, points)
    # Sampled in the other number of steps, it is the same network.
    monkeypatch.setattr(chessboard, "train", None)
    other = chessboard.run(tmp_path, "v_prediction", "bfloat16", 0, 300, 100, 10)[0]
    assert other.loss == outcome.loss and other.num_samples == 100


def test_points_of_several_batches_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(chessboard, "SAMPLE_BATCH", 30)
    monkeypatch.setattr(chessboard, "NUM_SHOWN", 50)
    # So that none is an error, which would be shown too.
    monkeypatch.setattr(chessboard, "MARGIN", float("inf"))
    outcome, points, wrong = chessboard.run(tmp_path, "v_prediction", "float32", 0, 10, 100, 2)
    assert outcome.num_samples == 100 and points.shape == (50, 2) and not wrong.any()


def test_epsilon_strays_in_a_short_run(monkeypatch, tmp_path):
    """Its errors are divided by the root of alpha-bar, 5e-5 at the last timestep (Eq. 18): what the page is about."""
    outcome, _, _ = short_run(monkeypatch, tmp_path, "epsilon", "float32")
    assert outcome.largest > 30 and outcome.num_errors > 150


def test_page_and_plot(tmp_path):
    outcomes = [chessboard.Outcome("epsilon", "bfloat16", seed, 0.1, 1000, 2 + seed, 5.0, 1.0) for seed in range(2)]
    page = chessboard.report({(100, "epsilon", "bfloat16"): outcomes}, "the command", "cloud.png")
    assert "| 100 | epsilon | bfloat16 | 0.2500 % (5 of 2,000) | 0.2000 to 0.3000 % | 5.00 | 0.2 % |" in page
    assert "the command" in page and "![](cloud.png)" in page
    points = torch.randn(20, 2)
    clouds = {(100, *system): (points, points[:, 0] > 1) for system in chessboard.SYSTEMS}
    chessboard.plot(clouds, tmp_path / "cloud.png")
    assert (tmp_path / "cloud.png").stat().st_size > 1000


def test_outcomes_are_kept(monkeypatch, tmp_path):
    runs = []

    def run(*arguments):
        runs.append(arguments)
        outcome = chessboard.Outcome("epsilon", "float32", 0, 0.5, 10, 3, 9.0, 1.5)
        return outcome, torch.randn(4, 2, generator=seeded(0)), torch.tensor([True, False, False, True])

    monkeypatch.setattr(chessboard, "run", run)
    first = chessboard.kept_run(tmp_path / "work", "epsilon", "float32", 0, 300, 1000, 20)
    again = chessboard.kept_run(tmp_path / "work", "epsilon", "float32", 0, 300, 1000, 20)
    assert (
        len(runs) == 1
        and again[0] == first[0]
        and all(torch.equal(*pair) for pair in zip(first[1:], again[1:], strict=True))
    )
    chessboard.kept_run(tmp_path / "work", "epsilon", "float32", 0, 301, 1000, 20)
    assert len(runs) == 2


def test_page_of_several_numbers_of_steps(monkeypatch, tmp_path, capsys):
    # A page is named by the day and tells the commit, either of which may be another one when it is written again.
    monkeypatch.setattr(chessboard, "date", SimpleNamespace(today=lambda: date(2026, 1, 31)))
    monkeypatch.setattr(chessboard, "commit", lambda: "0123abc")
    given = ["chessboard", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--num_steps", "10"]
    given += ["--seeds", "1", "--num_inference_steps", "2", "3", "--num_samples"]
    monkeypatch.setattr(sys, "argv", [*given, "40", "20"])
    chessboard.main()
    (page,) = (tmp_path / "out").glob("*_chessboard.md")
    text = page.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if "_prediction | " in line or "epsilon | " in line]
    assert [row[0] for row in rows] == ["| 2"] * 4 + ["| 3"] * 4
    assert all(f"of {40 if row[0] == '| 2' else 20})" in row[3] for row in rows)
    assert "--num_inference_steps 2 3 --num_samples 40 20 --seeds 1" in text
    assert page.with_suffix(".png").stat().st_size > 0

    monkeypatch.setattr(chessboard, "run", lambda *arguments: pytest.fail("was run again"))
    chessboard.main()
    assert page.read_text() == text
    monkeypatch.setattr(sys, "argv", [*given, "40"])
    with pytest.raises(SystemExit):
        chessboard.main()
    assert "--num_samples" in capsys.readouterr().err

"""Every door of one folder, opened in fresh processes, gives what the saved model gave, bit for bit.

Each process has an empty home for caches. Without "installed" it does not know MMAR's package, and takes the code from
the folder or the repository.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, SHARDED_REPO
from safetensors.torch import load_file


CHECKOUT = Path(__file__).parents[2]
TRANSFORMERS_DOORS = {
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "text-to-image",
    "image-text-to-text",
}
DOORS = {
    "transformers": TRANSFORMERS_DOORS,
    "diffusers": {"DiffusionPipeline", "DiffusionPipeline call"},
    "installed": TRANSFORMERS_DOORS | {"MMARPipeline", "MMARPipeline call"},
}


def run_doors(doors: str, repos: list[str], tmp_path: Path, endpoint: str | None) -> Path:
    """Opens `repos` in a fresh process; the folder has, by number, what came out and what was saved again."""
    hidden = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "PYTHON", "XDG_", "http_proxy", "HTTP_PROXY")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    if doors == "installed":
        env["PYTHONPATH"] = str(CHECKOUT)
    out = tmp_path / "out"
    out.mkdir()
    spec = {"doors": doors, "repos": repos, "out": str(out)}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("doors.py")), str(tmp_path / "spec.json")]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    return out


def assert_same_outputs(opened_file: Path, expected_file: Path, doors: set[str]) -> None:
    opened, expected = load_file(opened_file), load_file(expected_file)
    assert doors <= {name.rpartition(": ")[0] for name in opened}
    for name, value in opened.items():
        wanted = expected[name.rpartition(": ")[2]]
        assert value.dtype == wanted.dtype and torch.equal(value, wanted), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_files(folder: Path, original: Path, without: tuple[str, ...] = ()) -> None:
    got, expected = files_of(folder), files_of(original)
    expected = {name: content for name, content in expected.items() if not name.startswith(without)}
    assert sorted(got) == sorted(expected)
    assert [name for name in got if got[name] != expected[name]] == []


@pytest.mark.parametrize("doors", DOORS)
@pytest.mark.parametrize("source", ["folder", "hub"])
def test_doors(source, doors, hub_root, hub_url, tmp_path):
    repos = [REPO, SHARDED_REPO]
    places = repos if source == "hub" else [str(hub_root / repo) for repo in repos]
    out = run_doors(doors, places, tmp_path, hub_url if source == "hub" else None)
    for number, repo in enumerate(repos):
        assert_same_outputs(out / str(number) / "opened.safetensors", hub_root / f"{repo}.safetensors", DOORS[doors])
        # Saved again by the class that came through the door, the files are the same.
        if doors != "transformers":
            assert_same_files(out / str(number) / "diffusers", hub_root / repo)
        if doors != "diffusers" and repo == REPO:
            only_diffusers = ("model_index.json", "scheduler/")
            assert_same_files(out / str(number) / "transformers", hub_root / repo, without=only_diffusers)

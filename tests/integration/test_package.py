"""The package as a wheel installs it: which folder may import which, and the marker that it has types."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml with tomllib", allow_module_level=True)

import tomllib


ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def installed(tmp_path):
    """The folders as setuptools puts them into a wheel."""
    for package, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items():
        if folder != "checkpoints":
            shutil.copytree(ROOT / folder, tmp_path / package.replace(".", "/"))
    return tmp_path


def check_imports(folder):
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache", ROOT / "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_no_folder_imports_one_above_it(installed):
    done = check_imports(installed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file, line",
    [
        ("modeling_mmar/masking_mmar.py", "from ..training import samples"),
        ("modeling_mmar/masking_mmar.py", "from ..files import write_whole"),
        ("conversion/compvis.py", "from ..training.rows import open_source"),
        ("evaluation/fid.py", "from ..conversion import compvis"),
        ("evaluation/fid.py", "from ..ablations import study"),
    ],
)
def test_a_forbidden_import_is_found(installed, file, line):
    with open(installed / "mmar" / file, "a", encoding="utf-8") as opened:
        opened.write(f"\n{line}\n")
    done = check_imports(installed)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_the_package_says_that_it_has_types(installed):
    assert (installed / "mmar" / "py.typed").is_file()
    assert "py.typed" in SETTINGS["tool"]["setuptools"]["package-data"]["mmar"]

"""Writes MMAR's code beside its weights, so that a folder or Hub repository opens where MMAR is not installed.

The folder is flat: transformers and diffusers copy a file and what it imports by a line with one leading dot, nothing
in sub-folders. diffusers follows such lines from file to file without remembering where it was, so that they must not
form a circle; and from a local folder it copies only what the first file names. Therefore it gets a first file of its
own, `ENTRY_MODULE`, which names all the others and is named by none.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError


if TYPE_CHECKING:
    # Named, so that whoever loads the model has these files too, and can save the whole folder again.
    from ..pipelines.pipeline_mmar import MMARPipeline  # noqa: F401
    from ..pipelines.text_to_image_mmar import MMARTextToImagePipeline  # noqa: F401
    from ..processors.processing_mmar import MMARProcessor  # noqa: F401


# What is exported, by folder of the installed package.
REMOTE_MODULES = {
    "conversion": ("card_mmar", "hub_mmar"),
    "modeling_mmar": (
        "configuration_mmar",
        "diffusion_mmar",
        "embedding_vit_mmar",
        "frozen_parts_mmar",
        "generation_mmar",
        "masking_mmar",
        "modeling_mmar",
        "parameterization_mmar",
        "plora_mmar",
        "quantization_mmar",
    ),
    "pipelines": ("pipeline_mmar", "text_to_image_mmar"),
    "processors": ("image_processing_mmar", "processing_mmar"),
}

# All weights files that a repository may have; an index without its shards would mislead.
WEIGHTS_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")

# The file that model_index.json names.
ENTRY_MODULE = "diffusers_mmar"

_ENTRY_TEMPLATE = """\
\"\"\"What diffusers opens first; written by hub_mmar.py.\"\"\"

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # diffusers copies the files named here and no others.
{lines}

# By path: diffusers makes the repository's name a part of the module's, and a dot in it breaks relative imports.
_spec = spec_from_file_location(f"{{__name__}}_pipeline", Path(__file__).with_name("pipeline_mmar.py"))
_module = module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
MMARPipeline = _module.MMARPipeline

__all__ = ["MMARPipeline"]
"""

_IMPORT_BETWEEN_FOLDERS = re.compile(r"^(\s*from )\.\.\w+\.(\w+_mmar import )", flags=re.MULTILINE)


def export_remote_code(folder: str | Path) -> None:
    r"""
    Writes MMAR's modules into a folder, flat.

    Works from the installed package and from exported code alike, with the same result.

    Args:
        folder (`str` or `Path`): Where to; exists.

    Raises:
        FileNotFoundError: If exported code does not hold all modules.
    """
    folder = Path(folder)
    # Read before writing: the folder may be the one that the code runs from.
    texts = {path.name: _flat(path.read_text(encoding="utf-8")) for path in _module_paths()}
    texts[f"{ENTRY_MODULE}.py"] = _entry_text()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def push_folder(
    write: Callable[[Path], Any],
    repo_id: str,
    card: Callable[[str], ModelCard] | None = None,
    commit_message: str = "Upload MMAR",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    r"""
    Uploads what is written to a folder, as one commit; the repository and the branch are made if need be.

    Args:
        write (`Callable`): Writes to the folder that it is given.
        repo_id (`str`): Repository, `"OWNER/NAME"` or `"NAME"`.
        card (`Callable`, *optional*): Makes the model card for the repository's full name, where it has none yet.
        commit_message (`str`, *optional*): Title of the commit.
        commit_description (`str`, *optional*): Text of the commit.
        private (`bool`, *optional*): Of a new repository.
        token (`str` or `bool`, *optional*): As in huggingface_hub; the stored one by default.
        revision (`str`, *optional*): Branch; main by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        ValueError: If there is no token that may write, or the upload broke. Large files that arrived are not sent
            again by the next try.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, _explained_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        needs_card = card is not None and not api.file_exists(repo_id, "README.md", revision=revision)
        folder = Path(name)
        with _as_it_is():
            write(folder)
            if needs_card:
                card(repo_id).save(folder / "README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # One file or shards: what an earlier upload left of the other kind would win over this one. Only files
            # that are not uploaded again are deleted.
            delete_patterns=list(WEIGHTS_PATTERNS) if any(folder.glob("model*.safetensors")) else None,
        )


class _WriteError(Exception):
    """Carries an error of what is uploaded past the explanations of the upload's own."""


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _WriteError from error


@contextlib.contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except _WriteError as error:
        raise error.__cause__ from None
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be 'OWNER/NAME' or 'NAME'; got {repo_id!r}.") from error
    except (HTTPError, LocalTokenNotFoundError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            raise ValueError(
                f"expected a token that may write to {repo_id!r}; there is none, or it may not. Pass `token`, or log "
                "in with `hf auth login`."
            ) from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(
            f"the upload to {repo_id!r} broke ({type(error).__name__}: {reason}) before its commit was confirmed. Try "
            "again: large files that arrived are not sent twice."
        ) from error


def _module_paths() -> Iterator[Path]:
    here = Path(__file__).resolve().parent
    is_flat = (here / "modeling_mmar.py").is_file()
    for subfolder, modules in REMOTE_MODULES.items():
        for module in modules:
            path = (here if is_flat else here.parent / subfolder) / f"{module}.py"
            if not path.is_file():
                raise FileNotFoundError(
                    f"expected {path.name}, a part of MMAR's code, in {path.parent}; it is not there. Load the model "
                    "from a folder or repository that was written whole, or install MMAR."
                )
            yield path


def _flat(text: str) -> str:
    """Turns imports between folders into imports within one."""
    return _IMPORT_BETWEEN_FOLDERS.sub(r"\1.\2", text)


def _entry_text() -> str:
    """The text of `ENTRY_MODULE`."""
    names = sorted(module for modules in REMOTE_MODULES.values() for module in modules)
    return _ENTRY_TEMPLATE.format(lines="".join(f"    from .{name} import *  # noqa: F403\n" for name in names))

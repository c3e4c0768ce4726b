"""Uploads to the Hub: one commit, whole or not at all, with errors that say what to do."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .configuration_mmar import shorten


# All weights files that a repository may have; an index without its shards would mislead.
WEIGHTS_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")


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
    if not isinstance(repo_id, str):
        raise ValueError(f"`repo_id` must be 'OWNER/NAME' or 'NAME'; got {shorten(repo_id)}.")
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
        raise ValueError(f"`repo_id` must be 'OWNER/NAME' or 'NAME'; got {shorten(repo_id)}.") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"expected the Hub to upload to {shorten(repo_id)}; HF_HUB_OFFLINE is set. Unset it and try again."
        ) from error
    except (HTTPError, LocalTokenNotFoundError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            raise ValueError(
                f"expected a token that may write to {shorten(repo_id)}; there is none, or it may not. Pass `token`, "
                "or log in with `hf auth login`."
            ) from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(
            f"the upload to {shorten(repo_id)} broke ({type(error).__name__}: {reason}) before its commit was "
            "confirmed. Check the network and try again: large files that arrived are not sent twice."
        ) from error

"""
What a folder of MMAR holds, and how it is loaded, saved and uploaded.

    config.json, generation_config.json    `MMARConfig`, defaults of `generate`
    model.safetensors, or shards           weights: all, or only the trained ones and references to the frozen parts
    *_mmar.py                              MMAR's code, so that the folder opens where MMAR is not installed
    processor_config.json, tokenizer files `MMARProcessor`
    model_index.json, scheduler/           what diffusers opens first
    README.md                              the model card

A reference to a frozen part is a repository at one commit, or a local folder with the SHA-256 of each weights file, in
`config.frozen_parts`:

    {"backbone": {"repo_id": "Qwen/Qwen2-7B-Instruct", "revision": "f2826a00..."}, "vae": {"repo_id": "runs/kl16"}}
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    find_adapter_config_file,
    is_peft_available,
)

from .configuration_mmar import TRAINED_SUFFIXES, MMARConfig, current_frozen_weights, shorten, shorten_names


# MMAR's code, by folder of the installed package. A folder of MMAR holds all files side by side.
REMOTE_MODULES = {
    "modeling_mmar": (
        "checks_mmar",
        "configuration_mmar",
        "diffusion_mmar",
        "embedding_vit_mmar",
        "fast_generation_mmar",
        "generation_mmar",
        "masking_mmar",
        "modeling_mmar",
        "parameterization_mmar",
        "plora_mmar",
        "prefix_mmar",
        "quantization_mmar",
        "saving_mmar",
    ),
    "pipelines": ("pipeline_mmar", "text_to_image_mmar"),
    "processors": ("image_processing_mmar", "processing_mmar"),
}
# Where a subclass has modules of its own, which go to its folders only.
SUBCLASS_FOLDER = "ablations"

MODEL_INDEX_NAME, SCHEDULER_FOLDER, CARD_NAME = "model_index.json", "scheduler", "README.md"
# The file that model_index.json names. diffusers copies what this one file names, and follows names from file to file
# without remembering where it was; so the file names all the others, and they form no circle.
ENTRY_MODULE = "diffusers_mmar"
_ENTRY_TEMPLATE = """\
\"\"\"What diffusers opens first; written by saving_mmar.py.\"\"\"

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
# What follows it in the exported modeling_mmar.py is written here, too.
_NAMED = "\n\n# Named so that whoever loads the model has these files too, and can save the complete folder again.\n"
_IMPORT_BETWEEN_FOLDERS = re.compile(r"^(\s*from )\.\.\w+\.(\w+_mmar import )", flags=re.MULTILINE)

# Where each part's weights are in MMAR, and under which beginnings in their own files.
PREFIXES = {
    "backbone": {"model.language_model.": "model.", "lm_head.": "lm_head."},
    "vae": {"vae.": ""},
}
# As transformers takes it: patterns of names in the parts' files -> names in MMAR.
KEY_MAPPING = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^(encoder|decoder|quant_conv|post_quant_conv|quantize)\.": r"vae.\1.",
}
# Likewise: what `torch.compile(part)`, put in the place of a part, adds to its weights' names. Each entry removes one,
# and compiled parts may stand in compiled ones.
COMPILED = {r"_orig_mod\.": "", r"_orig_mod[.]": ""}
# One file, or the index of several.
WEIGHTS_NAMES = dict.fromkeys(("model", "backbone"), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
WEIGHTS_NAMES["vae"] = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
# Arguments of `from_pretrained` that say where and how to download.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# Why a part cannot be downloaded, most special errors first.
_REASONS = {
    GatedRepoError: "access to it must be asked for",
    RevisionNotFoundError: "that revision is gone",
    RepositoryNotFoundError: "there is no such repository, or it is private",
    HFValidationError: "that is neither a repository's name nor an absolute path",
    Exception: "it is not in the cache and the Hub cannot be reached",
}

TAGS = ("mmar", "text-to-image", "image-text-to-text", "diffusers", "arxiv:2410.10798")
NOT_STATED = "Not stated."
PROMPT, QUESTION = "a red apple on a table", "Describe the image."
ABOUT = (
    "An MMAR: one model that writes text about images and generates images from text ([arXiv 2410.10798]"
    "(https://arxiv.org/abs/2410.10798); an independent implementation, not by the paper's authors)."
)
NEEDS_PROCESSOR = (
    "The examples need the processor in this repository; `processor.push_to_hub` adds it where the model alone was "
    "uploaded."
)
# Each opens a complete repository in a fresh process; the tests run them.
USAGE = {
    "diffusers": """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True, dtype=torch.float32)
image = pipe({prompt}, generator=torch.Generator().manual_seed(0)).images[0]
image.save("drawn.png")
""",
    "transformers": """\
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{repo}", trust_remote_code=True, dtype="float32")
content = [{{"type": "image", "url": "drawn.png"}}, {{"type": "text", "text": {question}}}]
print(pipe(text=[{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])
""",
    # A line that begins with the import would have transformers and diffusers ask for the package.
    "mmar installed, no remote code": """\
import torch
from {package} import MMARPipeline

pipe = MMARPipeline.from_pretrained("{repo}", dtype=torch.float32)
pipe({prompt}).images[0].save("drawn.png")
""",
}


class MMARSavingMixin:
    """Loading, saving and uploading of `MMARForConditionalGeneration`."""

    # Modules of a subclass, to be exported next to MMAR's own.
    remote_modules: tuple[str, ...] = ()
    # Entries of `vae_config` whose defaults in diffusers would give another image.
    needed_vae_entries: tuple[str, ...] = ("scaling_factor",)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        output_loading_info: bool = False,
        **kwargs,
    ):
        r"""
        Loads a model, or an adapter of peft on the model that it names; see `PreTrainedModel.from_pretrained`. Frozen
        parts that the model keeps by reference are fetched and joined.

        Raises:
            ValueError: If weights are missing: a file of a local folder, a part that is named by reference, or tensors
                in the files. Only what a subclass adds to the class that was saved is initialized at random.
        """
        path = pretrained_model_name_or_path
        if path is not None and is_peft_available():
            path, kwargs = _base_of_adapter(path, kwargs)
        kwargs["key_mapping"] = {**COMPILED, **(kwargs.get("key_mapping") or {})}
        download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
        source = path
        with contextlib.ExitStack() as opened:
            if path is not None:
                place = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name) is not None}
                check_folder(Path(path, place.get("subfolder", "")), kwargs.get("variant"))
                config = kwargs.get("config")
                if not isinstance(config, PreTrainedConfig):
                    config = cls.config_class.from_pretrained(path if config is None else config, **place, **download)
                if missing := [name for name in cls.needed_vae_entries if name not in config.vae_config]:
                    raise ValueError(
                        f"`vae_config` must hold {shorten_names(missing)}, without which diffusers would give another "
                        f"image; it is missing in {shorten(str(path))}. Copy config.json again."
                    )
                if config.frozen_weights == "reference":
                    if kwargs.get("variant"):
                        raise ValueError(
                            f"`variant` must be None for a model with parts by reference; got "
                            f"{shorten(kwargs['variant'])}."
                        )
                    kwargs = {name: value for name, value in kwargs.items() if name not in place}
                    kwargs["key_mapping"] |= KEY_MAPPING
                    joined = joined_folder(path, config.frozen_parts, **place, **download)
                    source = opened.enter_context(joined)
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        if source is not path:
            model.config.name_or_path = model.name_or_path = str(path)
        if missing := cls._missing_in_error(model.config, info["missing_keys"]):
            raise ValueError(
                f"expected all weights of the model in {shorten(str(pretrained_model_name_or_path))}; {len(missing)} "
                f"are missing, among them {shorten_names(missing[:3])}. Check that the config belongs to these "
                "weights and that they were written completely."
            )
        model._download_arguments = download
        # Loading makes new parameters, which are trainable.
        model.freeze()
        return (model, info) if output_loading_info else model

    @classmethod
    def _missing_in_error(cls, config: MMARConfig, missing_keys: set[str]) -> list[str]:
        """The missing weights that a checkpoint should hold: those of the class in `config.architectures`."""
        saved = [parent for parent in cls.__mro__ if parent.__name__ in (config.architectures or ())][:1]
        if missing_keys and saved and saved != [cls]:
            with torch.device("meta"):
                missing_keys = missing_keys & saved[0](config).state_dict().keys()
        return sorted(missing_keys)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        frozen: str | None = None,
        **kwargs,
    ) -> None:
        r"""
        Writes config.json, generation_config.json, the weights and MMAR's code; see `PreTrainedModel.save_pretrained`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            is_main_process (`bool`, *optional*, defaults to `True`): In distributed training, whether this process
                writes.
            push_to_hub (`bool`, *optional*, defaults to `False`): Also upload, to `repo_id` or a repository of the
                folder's name.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest weights file.
            frozen (`str`, *optional*): `"include"` writes all weights; `"reference"` only those that were trained, and
                where the others come from, as `config.frozen_parts` has it. By default as the model was loaded.
            **kwargs: Other arguments of `PreTrainedModel.save_pretrained`; `repo_id`, `commit_message`, `private`,
                `token` and `create_pr` of `push_to_hub`.

        Raises:
            ValueError: For `frozen="reference"` if `config.frozen_parts` names no part, or a part has changed since.
        """
        hub_names = ("repo_id", "commit_message", "private", "token", "create_pr", "revision")
        hub_kwargs = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        # MMAR has one format; converting "back" would only reorder the weights of a model that was loaded.
        kwargs.setdefault("save_original_format", False)
        if is_main_process and os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder; got the file {shorten(str(save_directory))}.")
        weights = [Path(save_directory) / name for name in WEIGHTS_NAMES["model"]]
        before = [path.stat() if path.is_file() else None for path in weights]
        with self._frozen_as(frozen):
            for part, reference in (self.config.frozen_parts or {}).items():
                if Path(reference["repo_id"]).resolve() == Path(save_directory).resolve():
                    raise ValueError(
                        f"`save_directory` must be another folder than {shorten(str(save_directory))}, which "
                        f"`config.frozen_parts` names as the {part}: it would be overwritten."
                    )
            if self.config.frozen_weights == "reference":
                kwargs["state_dict"] = self._trained_state(kwargs.get("state_dict"), is_main_process)
            super().save_pretrained(
                save_directory, is_main_process=is_main_process, max_shard_size=max_shard_size, **kwargs
            )
        if is_main_process:
            # One file or shards: what an earlier save left of the other kind would win over what was written now.
            written = [path.is_file() and path.stat() != old for path, old in zip(weights, before, strict=True)]
            for path, is_new in zip(weights, written, strict=True):
                if any(written) and not is_new:
                    path.unlink(missing_ok=True)
            self.save_code(save_directory)
            if push_to_hub:
                repo_id = hub_kwargs.pop("repo_id", Path(save_directory).name)
                self.push_to_hub(repo_id, max_shard_size=max_shard_size, frozen=frozen, **hub_kwargs)

    def save_code(self, folder: str | os.PathLike) -> None:
        """Writes MMAR's code and that of a subclass into a folder; see `export_remote_code`."""
        export_remote_code(folder, self.remote_modules)

    def save_index(self, folder: str | os.PathLike, pipeline: Any) -> None:
        r"""
        Writes what diffusers needs to open a folder of the model and the processor: model_index.json, scheduler.

        Args:
            folder (`str` or `os.PathLike`): Folder of the saved model; exists.
            pipeline (`MMARPipeline`): Its processor, its scheduler and its class are named.
        """
        pipeline.scheduler.save_pretrained(Path(folder) / SCHEDULER_FOLDER)
        model_index = {
            "_class_name": [ENTRY_MODULE, type(pipeline).__name__],
            "_diffusers_version": importlib.metadata.version("diffusers"),
            "model": ["transformers", type(self).__name__],
            "processor": ["transformers", type(pipeline.processor).__name__],
            "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        }
        text = json.dumps(model_index, indent=2) + "\n"
        (Path(folder) / MODEL_INDEX_NAME).write_text(text, encoding="utf-8", newline="\n")

    def save_folder(self, folder: str | os.PathLike, pipeline: Any, **kwargs) -> None:
        r"""
        Writes the folder that opens through every door: model, processor and code at its root, the scheduler below.

        Args:
            folder (`str` or `os.PathLike`): Folder, made if it does not exist.
            pipeline (`MMARPipeline` or `MMARTextToImagePipeline`): The latter has no scheduler, and diffusers does not
                open its folder.
            **kwargs: Arguments of `save_pretrained`.
        """
        self.save_pretrained(folder, **kwargs)
        pipeline.processor.save_pretrained(folder)
        if hasattr(pipeline, "scheduler"):
            self.save_index(folder, pipeline)

    def save_all_but_weights(self, folder: str | os.PathLike, pipeline: Any) -> None:
        """Writes what `save_folder` does, for a model whose weights are written otherwise; the folder exists."""
        for part in (self.config, self.generation_config, pipeline.processor):
            part.save_pretrained(folder)
        self.save_code(folder)
        self.save_index(folder, pipeline)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        frozen: str | None = None,
        commit_message: str = "Upload MMARForConditionalGeneration",
        tags: list[str] | str | None = None,
        pipeline: Any = None,
        **kwargs,
    ) -> CommitInfo:
        r"""
        Uploads what `save_pretrained` writes, and a model card where the repository has none. `MMARPipeline` uploads
        the complete folder, with the processor.

        Args:
            repo_id (`str`): Repository, made if it does not exist.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest weights file.
            frozen (`str`, *optional*): `"include"` or `"reference"`; see `save_pretrained`.
            commit_message (`str`, *optional*): Title of the commit.
            tags (`list[str]`, *optional*): For the new card.
            pipeline (`MMARPipeline`, *optional*): Upload its complete folder; see `save_folder`.
            **kwargs: `commit_description`, `private`, `token`, `revision` (a branch) and `create_pr`.

        Returns:
            `huggingface_hub.CommitInfo`

        Raises:
            ValueError: If there is no token that may write, the upload broke, or a part is kept by reference to a
                local folder, which others do not have.
        """
        with (
            self._frozen_as(frozen, is_shared=True),
            pushing(repo_id, commit_message=commit_message, **kwargs) as push,
        ):
            if pipeline is None:
                self.save_pretrained(push.folder, max_shard_size=max_shard_size)
            else:
                self.save_folder(push.folder, pipeline, max_shard_size=max_shard_size)
            if push.needs_card:
                tags = [tags] if isinstance(tags, str) else tags
                self.model_card(push.repo_id, tags, pipeline is not None).save(push.folder / CARD_NAME)
        return push.commit

    def model_card(self, repo_id: str, tags: list[str] | None = None, has_processor: bool = True) -> ModelCard:
        """
        The card of the folder that the model was loaded from, with its notices, for another repository; without one, a
        short card. `mmar card` makes a complete one.
        """
        readme = Path(self.name_or_path) / CARD_NAME
        if self.name_or_path and readme.is_file():
            card = card_for(ModelCard.load(readme), repo_id)
        else:
            card = short_card(self.config, repo_id, has_processor)
        card.data.tags = list(card.data.tags or [])
        card.data.tags += [tag for tag in tags or [] if tag not in card.data.tags]
        return card

    def gather_sharded_state_dict_for_save(self, *args, **kwargs) -> dict[str, Tensor]:
        """As transformers', without the second name of tied weights, which gathering makes two of."""
        state = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        if self.lm_head.weight is self.get_input_embeddings().weight:
            state = {name: value for name, value in state.items() if name not in self._tied_weights_keys}
        return state

    @contextlib.contextmanager
    def _frozen_as(self, frozen: str | None, is_shared: bool = False) -> Iterator[None]:
        """Has the config say, while it is written, where the frozen weights are; `is_shared`: for other machines."""
        config = self.config
        kept = config.frozen_weights, config.frozen_parts
        way = current_frozen_weights(config.frozen_weights if frozen is None else frozen, "`frozen`")
        if way == "reference" and not config.frozen_parts:
            raise ValueError(
                "`frozen='reference'` needs `config.frozen_parts`, where the backbone and the VAE come from, such as "
                "{'backbone': {'repo_id': 'Qwen/Qwen2-7B-Instruct', 'revision': '<commit>'}}; set it."
            )
        config.frozen_weights = way
        try:
            if parts := config.frozen_parts:
                # They may have been set by hand since the config was made.
                config.validate_architecture()
                parts = complete_references(parts) if way == "reference" else parts
                local = {part: reference for part, reference in parts.items() if is_local_reference(reference)}
                if is_shared and way == "reference" and local:
                    part, reference = next(iter(local.items()))
                    raise ValueError(
                        f"`config.frozen_parts[{shorten(part)}]` must name the {part} in a repository that others can "
                        f"read; got the local folder {shorten(reference['repo_id'])}. Upload it and name it, or push "
                        "with `frozen='include'`."
                    )
                # Where a part lay on this machine is nobody else's business.
                dropped = local if is_shared else {}
                config.frozen_parts = {part: parts[part] for part in parts if part not in dropped} or None
            yield
        finally:
            config.frozen_weights, config.frozen_parts = kept

    def _trained_state(self, state: dict[str, Tensor] | None, is_main_process: bool) -> dict[str, Tensor]:
        """The weights that no reference gives, once those that are left out are known to be what it names."""
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "`frozen` must be 'include' for a quantized model, whose backbone is not the one that the reference "
                "names; got 'reference'. Or save PLoRA alone with `mmar peft export`."
            )
        state = self.state_dict() if state is None else state
        parts = self.config.frozen_parts
        if self.config.tie_word_embeddings:
            state = {name: value for name, value in state.items() if name not in self._tied_weights_keys}
        if is_main_process:
            check_unchanged(state, parts, **getattr(self, "_download_arguments", {}))
        trained = {name: value for name, value in state.items() if part_of(name, parts) is None}
        if is_main_process and not trained:
            raise ValueError(
                f"expected the trained weights in `state_dict`; got {len(state)} tensors, none of them trained. Leave "
                "`state_dict` out to save the model's own."
            )
        return trained


def _base_of_adapter(path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str | os.PathLike, dict[str, Any]]:
    """Of an adapter's folder or repository the model that it names, and the arguments that load the adapter on it."""
    adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
    if "_adapter_model_path" in adapter_kwargs:
        return path, kwargs  # an auto class has been here
    where = {name: kwargs[name] for name in (*DOWNLOAD_ARGUMENTS, "revision", "subfolder") if name in kwargs}
    file = find_adapter_config_file(path, **{**where, **adapter_kwargs})
    if file is None or os.path.isfile(os.path.join(path, CONFIG_NAME)):
        return path, kwargs
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`base_model_name_or_path` in {shorten(str(file))} must name the adapter's model; got none. Load the "
            "model, and the adapter with `load_adapter`."
        )
    adapter_kwargs |= {name: kwargs[name] for name in ("revision", "subfolder", "token") if name in kwargs}
    adapter_kwargs["_adapter_model_path"] = path
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    return base, {**kwargs, "adapter_kwargs": adapter_kwargs}


# ------------------------------------------------------------------------------------------------------ weights files


def check_folder(folder: Path, variant: str | None = None) -> None:
    r"""
    Looks at a local folder before transformers loads it; anything else, such as a repository's name, passes.

    Args:
        folder (`Path`): Of a saved model.
        variant (`str`, *optional*): As for `from_pretrained`. Other weights may be loaded in its place; transformers
            says what is missing.

    Raises:
        ValueError: If the config or weights files are missing, or one was not written or copied completely.
    """
    if not folder.is_dir():
        return
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"expected {CONFIG_NAME} in {shorten(str(folder))}; it is missing. Name the folder that `save_pretrained` "
            "wrote, or copy it completely."
        )
    if variant is None:
        for file in weights_files("model", folder):
            open_weights(file)
    else:
        for index in folder.glob(SAFE_WEIGHTS_INDEX_NAME.replace(".json", "*.json")):
            names_in_index(index)


def weights_files(part: str, folder: Path) -> list[Path]:
    r"""
    The weights files of a model, or of a part in its own folder.

    Args:
        part (`str`): `"model"`, `"backbone"` or `"vae"`.
        folder (`Path`): A local folder.

    Returns:
        `list[Path]`

    Raises:
        ValueError: If there are none, or one is missing.
    """
    single, index = WEIGHTS_NAMES[part]
    names = [single]
    if not (folder / single).is_file() and (folder / index).is_file():
        names = names_in_index(folder / index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"expected the weights files {', '.join(names)} of the {part} in {shorten(str(folder))}; "
            f"{', '.join(missing)} missing. Only safetensors are read. Copy or download the complete folder."
        )
    return [folder / name for name in names]


def names_in_index(index: Path) -> list[str]:
    r"""
    The weights files that the index of a folder names.

    Args:
        index (`Path`): The index.

    Returns:
        `list[str]`: Their names, in order.

    Raises:
        ValueError: If it cannot be read, or names a file outside its folder, which would be read as weights.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected the names of the weights files in {shorten(str(index))}; it cannot be read "
            f"({shorten(repr(error))}). Copy or download it again."
        ) from error
    if outside:
        raise ValueError(
            f"{shorten(str(index))} must name weights files in its own folder; got {shorten_names(outside)}. Do not "
            "load a folder of somebody else that does."
        )
    return names


def open_weights(file: Path) -> Any:
    """Opens a safetensors file to read tensor by tensor; raises a `ValueError` if it is missing, broken or cut off."""
    try:
        return safe_open(file, framework="pt")  # reads the header, and compares it with the file's size
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"expected complete safetensors in {shorten(str(file))}; got a missing, broken or truncated file "
            f"({shorten(error)}). Copy or download it again."
        ) from error


def apply_umask(folder: str | os.PathLike) -> None:
    r"""
    Gives the weights files of a folder the permissions that other new files have; safetensors writes them for their
    owner alone.

    Args:
        folder (`str` or `os.PathLike`): Where they were written.
    """
    files = [file for file in Path(folder).glob("*.safetensors") if stat.S_IMODE(file.stat().st_mode) == 0o600]
    if not files:
        return
    # To ask for the umask is to change it, for all threads.
    probe = Path(folder) / f".{uuid.uuid4().hex}"
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        file.chmod(mode)


def sha256_of(file: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex; computed once per process as long as the file's size and time of change stay."""
    state = Path(file).stat()
    return _sha256(str(Path(file).resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(file: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- frozen parts by reference


def part_of(name: str, parts: Any) -> str | None:
    """The frozen part, one of `parts`, to which MMAR's weight of this name belongs; None if it is trained."""
    if name.endswith(TRAINED_SUFFIXES):
        return None
    return next((part for part in parts if name.startswith(tuple(PREFIXES[part]))), None)


def make_reference(part: str, repo_id: str, folder: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    r"""
    Makes the reference to a part that was just read.

    Args:
        part (`str`): `"backbone"` or `"vae"`.
        repo_id (`str`): Repository or local folder.
        folder (`str` or `os.PathLike`): Where its files lie; for a repository, a snapshot of the cache.
        revision (`str`, *optional*): Branch, tag or commit; for a repository the snapshot's commit is taken.

    Returns:
        `dict`: `repo_id` with the commit as `revision`, or with `sha256` of each weights file of a local folder.
    """
    if not Path(repo_id).is_dir():
        # The cache keeps each commit in a folder of its name.
        is_snapshot = Path(folder).parent.name == "snapshots"
        return {"repo_id": repo_id, "revision": Path(folder).name if is_snapshot else revision}
    hashes = {file.name: sha256_of(file) for file in weights_files(part, Path(folder))}
    return {"repo_id": str(Path(repo_id).absolute()), "sha256": hashes}


def complete_references(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """References, of which those to local folders that were written by hand get absolute paths and hashes."""
    completed = dict(parts)
    for part, reference in parts.items():
        folder = Path(reference["repo_id"])
        if reference.get("revision") is None and folder.is_dir():
            hashes = reference.get("sha256")
            found = {"repo_id": str(folder.absolute())} if hashes else make_reference(part, str(folder), folder)
            completed[part] = {**reference, **found}
    return completed


def is_local_reference(reference: dict[str, Any]) -> bool:
    """Whether a reference names a folder and not a repository."""
    if reference.get("sha256") is not None or Path(reference["repo_id"]).is_absolute():
        return True
    return reference.get("revision") is None and Path(reference["repo_id"]).is_dir()


def fetch_part(part: str, reference: dict[str, Any], **download: Any) -> list[Path]:
    r"""
    Finds or downloads the weights of a part.

    Args:
        part (`str`): `"backbone"` or `"vae"`.
        reference (`dict`): As in `config.frozen_parts`.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Returns:
        `list[Path]`: Its weights files.

    Raises:
        ValueError: If the repository, the revision or a file is gone or out of reach, or a file has another hash.
    """
    repo_id, revision = reference["repo_id"], reference.get("revision")
    name = f"`config.frozen_parts[{shorten(part)}]`"
    what = f"{name} must be the {part} of this model, {shorten(repo_id)}"
    what += "" if revision is None else f" at revision {shorten(revision)}"
    if not is_local_reference(reference):
        single, index = WEIGHTS_NAMES[part]
        patterns = [single.replace(".safetensors", "*.safetensors"), index]
        try:
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **download)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = next(text for kind, text in _REASONS.items() if isinstance(error, kind))
            raise ValueError(
                f"{what}; {reason} ({type(error).__name__}). Download it first, pass a `token` that may read it, or "
                f"set {name} to a copy."
            ) from error
        return weights_files(part, Path(folder))
    if not Path(repo_id).is_dir():
        raise ValueError(f"{what}; there is no such folder here. Copy it to that place, or set {name} to where it is.")
    files = weights_files(part, Path(repo_id))
    hashes = reference.get("sha256") or {}
    if hashes and (unknown := [file.name for file in files if file.name not in hashes]):
        raise ValueError(
            f"{what}, with the SHA-256 of each of its files; {', '.join(unknown)} missing in `sha256`. Complete it or "
            "leave it out."
        )
    for file in files:
        if hashes and (got := sha256_of(file)) != hashes[file.name]:
            raise ValueError(
                f"{what}; {shorten(str(file))} has changed: its SHA-256 is {got}, not {shorten(hashes[file.name])}. "
                "Restore the file, or save the model again with the part that it was trained with."
            )
    return files


@contextlib.contextmanager
def joined_folder(
    own: str | os.PathLike,
    parts: dict[str, dict[str, Any]],
    revision: str | None = None,
    subfolder: str = "",
    **download: Any,
) -> Iterator[Path]:
    r"""
    A folder from which transformers loads the trained weights and the frozen parts together, without copying them.

    Args:
        own (`str` or `os.PathLike`): Folder or repository of the trained weights.
        parts (`dict`): References by part, as in `config.frozen_parts`.
        revision (`str`, *optional*): Of that repository.
        subfolder (`str`, *optional*, defaults to `""`): In it.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Yields:
        `Path`: Its index names the weights files by their absolute paths. To be loaded with `KEY_MAPPING`.

    Raises:
        ValueError: If a part cannot be had.
    """
    folder = Path(own)
    if not folder.is_dir():
        inside = f"{subfolder}/" if subfolder else ""
        patterns = [f"{inside}*.safetensors", f"{inside}*.json"]
        folder = Path(snapshot_download(str(own), revision=revision, allow_patterns=patterns, **download))
    folder = folder / subfolder
    files = weights_files("model", folder)
    for part, reference in parts.items():
        files += fetch_part(part, reference, **download)
    weight_map = {}
    for file in files:
        with open_weights(file) as opened:
            weight_map |= dict.fromkeys(opened.keys(), str(file.absolute()))
    with tempfile.TemporaryDirectory() as joined:
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            if (folder / name).is_file():
                (Path(joined) / name).write_bytes((folder / name).read_bytes())
        index = {"metadata": {}, "weight_map": weight_map}
        (Path(joined) / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        yield Path(joined)


def check_unchanged(state: dict[str, Tensor], parts: dict[str, dict[str, Any]], **download: Any) -> None:
    r"""
    Makes sure that nothing is lost when frozen weights are left out.

    Args:
        state (`dict[str, Tensor]`): The model's weights.
        parts (`dict`): References by part.
        **download: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Raises:
        ValueError: If a weight differs from the one that its reference names.
    """
    given = set()
    for part, reference in parts.items():
        for file in fetch_part(part, reference, **download):
            with open_weights(file) as opened:
                for source in opened.keys():
                    name = _name_in_mmar(part, source)
                    given.add(name)
                    value = state.get(name)
                    if value is None or value.device.type == "meta":
                        continue  # tied, or offloaded: it was not trained
                    expected = opened.get_tensor(source).to(value.dtype)
                    if expected.shape != value.shape or not torch.equal(expected, value.detach().cpu()):
                        raise ValueError(
                            f"`frozen='reference'` needs the weights of {shorten(reference['repo_id'])}; {name} is "
                            "another. It was trained or replaced: save with `frozen='include'`."
                        )
    if left := sorted(name for name in state if part_of(name, parts) is not None and name not in given):
        raise ValueError(
            f"`frozen='reference'` needs references that give all weights to be left out; {len(left)} are not there, "
            f"among them {', '.join(left[:3])}. Save with `frozen='include'`."
        )


def _name_in_mmar(part: str, source: str) -> str:
    for name, own in PREFIXES[part].items():
        if source.startswith(own):
            return name + source.removeprefix(own)
    return source


# ------------------------------------------------------------------------------------------------------ exported code


def export_remote_code(folder: str | os.PathLike, subclass_modules: tuple[str, ...] = ()) -> None:
    r"""
    Writes MMAR's modules into a folder, side by side, so that it opens where MMAR is not installed.

    Works from the installed package and from exported code alike, with the same result.

    Args:
        folder (`str` or `os.PathLike`): Where to; exists.
        subclass_modules (`tuple[str]`, *optional*): Modules of a model that builds on MMAR, to be written too.

    Raises:
        FileNotFoundError: If exported code does not hold all modules.
    """
    here = Path(__file__).resolve().parent
    is_flat = (here / "processing_mmar.py").is_file()
    # Read before writing: the folder may be the one that the code runs from.
    texts = {}
    for package, modules in (*REMOTE_MODULES.items(), (SUBCLASS_FOLDER, subclass_modules)):
        for module in modules:
            path = (here if is_flat else here.parent / package) / f"{module}.py"
            if not path.is_file():
                raise FileNotFoundError(
                    f"expected {path.name}, a part of MMAR's code, in {path.parent}; it is not there. Load the model "
                    "from a complete folder or repository, or install MMAR."
                )
            text = path.read_text(encoding="utf-8")
            texts[module] = _IMPORT_BETWEEN_FOLDERS.sub(r"\1.\2", text).partition(_NAMED)[0]
    named = _imports_of(REMOTE_MODULES["pipelines"] + REMOTE_MODULES["processors"])
    texts["modeling_mmar"] += f"{_NAMED}from typing import TYPE_CHECKING  # noqa: E402\n\n\nif TYPE_CHECKING:\n{named}"
    texts[ENTRY_MODULE] = _ENTRY_TEMPLATE.format(lines=_imports_of(texts))
    for module, text in texts.items():
        (Path(folder) / f"{module}.py").write_text(text, encoding="utf-8", newline="\n")


def _imports_of(modules: Any) -> str:
    return "".join(f"    from .{name} import *  # noqa: F403\n" for name in sorted(modules))


# ------------------------------------------------------------------------------------------------ uploads, model card


@dataclass
class Push:
    r"""
    An upload under way.

    Args:
        repo_id (`str`): Full name of the repository.
        folder (`Path`): Where to write what is uploaded.
        needs_card (`bool`): Whether the repository has no model card yet.
        commit (`huggingface_hub.CommitInfo`, *optional*): The commit, once it is made.
    """

    repo_id: str
    folder: Path
    needs_card: bool
    commit: CommitInfo | None = None


@contextlib.contextmanager
def pushing(
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Iterator[Push]:
    r"""
    Uploads what is written within the context, as one commit; the repository and the branch are made if need be.

    Args:
        repo_id (`str`): Repository, `"OWNER/NAME"` or `"NAME"`.
        commit_message (`str`): Title of the commit.
        commit_description (`str`, *optional*): Text of the commit.
        private (`bool`, *optional*): Of a new repository.
        token (`str` or `bool`, *optional*): As in huggingface_hub; the stored one by default.
        revision (`str`, *optional*): Branch; main by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.

    Yields:
        `Push`: Where to write. It has the commit afterwards.

    Raises:
        ValueError: If there is no token that may write, or the upload broke. Large files that arrived are not sent
            again by the next try.
    """
    with _explained_errors(repo_id):
        api = HfApi(token=token)
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(full_name, branch=revision, exist_ok=True)
        needs_card = not api.file_exists(full_name, CARD_NAME, revision=revision)
    with tempfile.TemporaryDirectory() as name:
        push = Push(full_name, Path(name), needs_card)
        yield push
        # One file or shards: what an earlier upload left of the other kind would win over this one. Only files that
        # are not uploaded again are deleted.
        has_weights = any(push.folder.glob("model*.safetensors"))
        with _explained_errors(repo_id):
            push.commit = api.upload_folder(
                repo_id=full_name,
                folder_path=push.folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=["model*.safetensors", SAFE_WEIGHTS_INDEX_NAME] if has_weights else None,
            )


@contextlib.contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    name = f"`repo_id` must be 'OWNER/NAME' or 'NAME'; got {shorten(repo_id)}."
    if not isinstance(repo_id, str):
        raise ValueError(name)
    try:
        yield
    except HFValidationError as error:
        raise ValueError(name) from error
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
        raise ValueError(
            f"the upload to {shorten(repo_id)} broke ({type(error).__name__}: {shorten(error)}) before its commit was "
            "confirmed. Check the network and try again: large files that arrived are not sent twice."
        ) from error


def short_card(config: MMARConfig, repo_id: str, has_processor: bool) -> ModelCard:
    r"""
    A card of what is known without its author.

    Args:
        config (`MMARConfig`): The model's configuration.
        repo_id (`str`): Repository that the examples open.
        has_processor (`bool`): Whether the processor is in the repository; the examples need it.

    Returns:
        `huggingface_hub.ModelCard`
    """
    data = ModelCardData(
        library_name="transformers", pipeline_tag="any-to-any", tags=list(TAGS), base_model=backbone_of(config)
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.split('/')[-1]}", ABOUT, "## Use"]
    parts += [] if has_processor else [NEEDS_PROCESSOR]
    parts += usage(repo_id, PROMPT, QUESTION)
    for heading in ("Intended use", "Limitations", "Training data", "Training", "Evaluation", "License"):
        parts += [f"## {heading}", NOT_STATED]
    return ModelCard("\n\n".join(parts) + "\n")


def usage(repo_id: str, prompt: str, question: str, examples: dict[str, str] = USAGE) -> list[str]:
    """The examples of a card, for a repository, with a prompt and a question about an image."""
    texts = {name: json.dumps(text, ensure_ascii=False) for name, text in (("prompt", prompt), ("question", question))}
    return [
        f"With {door}:\n\n```python\n{code.format(repo=repo_id, package='mmar', **texts)}```"
        for door, code in examples.items()
    ]


def backbone_of(config: MMARConfig) -> list[str] | None:
    """The backbone's repository, where the config names one."""
    repo_id = ((config.frozen_parts or {}).get("backbone") or {}).get("repo_id")
    return None if repo_id is None or Path(repo_id).is_absolute() else [repo_id]


def card_for(card: ModelCard, repo_id: str) -> ModelCard:
    """The same card with examples that open another repository."""
    opened = r"(from_pretrained\(|model=)\"[^\"]*\""
    return ModelCard(re.sub(opened, lambda found: f'{found[1]}"{repo_id}"', str(card)))

"""
Makes an untrained MMAR from a Qwen2 and a VAE: everything that training needs to begin.

    mmar convert qwen2 --backbone Qwen/Qwen2-7B-Instruct --vae runs/kl16 --preset mmar-7b \\
        --out runs/mmar-7b

The backbone is any Qwen2 or Qwen2.5, a local folder or a repository of the Hub; its config decides the language model,
the preset decides PLoRA, EmbeddingViT and Diffusion MLP. Weights are written shard by shard: no more than one shard is
in memory. `--frozen reference` leaves Qwen2 and the VAE out, and names them.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling_mmar.configuration_mmar import MMARConfig, shorten, shorten_names
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..modeling_mmar.saving_mmar import PREFIXES, make_reference, open_weights, part_of, weights_files
from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.image_processing_mmar import MMARImageProcessor
from ..processors.processing_mmar import IMAGE_TOKEN, TURN_END, TURN_START, MMARProcessor
from .folders import check_shard_size, new_folder, read_config
from .latent_moments import check_measured
from .models import model_class_of


PRESETS = Path(__file__).resolve().parent.parent / "configs"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# What is read of a backbone.
BACKBONE_FILES = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "*.safetensors*")
# Tensors with a row for each token of the vocabulary.
TOKEN_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def load_preset(name: str) -> MMARConfig:
    r"""
    Args:
        name (`str`): A preset, such as `"mmar-7b"`, or a folder with a config.json.

    Returns:
        `MMARConfig`

    Raises:
        ValueError: If there is none of that name.
    """
    folder = Path(name) if (Path(name) / "config.json").is_file() else PRESETS / name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in PRESETS.glob("*/config.json"))
        raise ValueError(
            f"`preset` must be one of {', '.join(known)} or a folder with a config.json; got {shorten(name)}."
        )
    return read_config(folder)


def find_backbone(backbone: str, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of a Qwen2, downloaded if need be; raises a `ValueError` if it cannot be had or is another."""
    folder = Path(backbone)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(backbone, revision=revision, allow_patterns=list(BACKBONE_FILES), token=token)
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(
                f"expected a local folder or a repository of the Hub; {shorten(backbone)}{at} cannot be had "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Check the name, the revision, the "
                "`token` and the network."
            ) from error
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"expected a Qwen2 in {shorten(backbone)}; its config.json cannot be read ({shorten(error)})."
        ) from error
    if model_type != "qwen2":
        raise ValueError(
            f"expected a Qwen2 or Qwen2.5 in {shorten(backbone)}; got the model type {shorten(model_type)}. PLoRA's "
            "layers are built on Qwen2."
        )
    return folder


class _Weights:
    """Tensors of safetensors files by name, read one by one."""

    def __init__(self, files: list[Path]):
        self._files = {}
        for file in files:
            opened = open_weights(file)
            self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> set[str]:
        return set(self._files)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].get_tensor(name).dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _sources(shapes: dict[str, Tensor], parts: dict[str, _Weights]) -> dict[str, tuple[str, str]]:
    """MMAR's name -> part and name there, for all frozen weights; each is used exactly once."""
    sources = {}
    for name in shapes:
        part = part_of(name, parts)
        if part is not None:
            prefix = next(prefix for prefix in PREFIXES[part] if name.startswith(prefix))
            sources[name] = (part, PREFIXES[part][prefix] + name.removeprefix(prefix))
    for part, weights in parts.items():
        expected = {source for of, source in sources.values() if of == part}
        # A tied head may be stored as well.
        left_over = weights.names() - expected - ({"lm_head.weight"} if "lm_head.weight" not in shapes else set())
        if missing := expected - weights.names():
            raise ValueError(
                f"expected all weights of the {part}; {len(missing)} are missing, among them "
                f"{', '.join(sorted(missing)[:3])}. Copy or download it whole."
            )
        if left_over:
            raise ValueError(
                f"expected a {part} as its config says; {len(left_over)} weights are left over, among them "
                f"{', '.join(sorted(left_over)[:3])}."
            )
    return sources


@torch.no_grad()
def _initial_values(model: MMARForConditionalGeneration, name: str, seed: int) -> Tensor:
    """
    A new weight as `MMARForConditionalGeneration(config)` draws it, float32. All of its module's are drawn, from a
    seed of the module's own, so that the result does not depend on the shards.
    """
    owner_name, _, own_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    kept = dict(owner._parameters)
    for key, value in kept.items():
        if value is not None and part_of(f"{owner_name}.{key}", PREFIXES) is None:
            owner._parameters[key] = nn.Parameter(torch.empty(value.shape))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}.{owner_name}".encode()))
            # As transformers does: by the innermost model that the module is in.
            around = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
            around = [name for name in around if not name or owner_name.startswith(f"{name}.")]
            model.get_submodule(max(around, key=len))._init_weights(owner)
        return owner._parameters[own_name].data
    finally:
        owner._parameters.update(kept)


def _shards(
    model: MMARForConditionalGeneration, dtype: torch.dtype, max_shard_size: str, referenced: set[str]
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Which weights go to which file, as `save_pretrained` has it, and the index where there are several files."""
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    planned = {
        name: torch.empty_like(value, dtype=torch.float32 if name.startswith("vae.") else dtype)
        for name, value in model.state_dict().items()
        if name not in tied and part_of(name, referenced) is None
    }
    pattern = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(planned, filename_pattern=pattern, max_shard_size=max_shard_size)
    index = None
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
    return split.filename_to_tensors, index


def _shard_tensors(
    names: list[str],
    model: MMARForConditionalGeneration,
    sources: dict[str, tuple[str, str]],
    parts: dict[str, _Weights],
    dtype: torch.dtype,
    seed: int,
    num_added_rows: int,
) -> Iterator[tuple[str, Tensor]]:
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name in names:
        if name in sources:
            part, source = sources[name]
            value = parts[part][source]
            if num_added_rows and name in TOKEN_TABLES:
                # The mean of the head's rows gives the mean logit: a probability of at most 1 / vocab_size.
                mean = value.mean(0, keepdim=True, dtype=torch.float32).to(value.dtype)
                value = torch.cat([value, mean.expand(num_added_rows, -1)])
        else:
            part, value = None, _initial_values(model, name, seed)
        if value.shape != shapes[name]:
            raise ValueError(
                f"expected {name} of shape {tuple(shapes[name])}, as the config says; the {part} has "
                f"{tuple(value.shape)}."
            )
        yield name, value.to(torch.float32 if part == "vae" else dtype).contiguous()


def init_from_qwen2(
    backbone: str,
    vae: str | Path,
    preset: str,
    out: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    frozen: str = "include",
    max_shard_size: str = "5GB",
    seed: int = 0,
    token: str | None = None,
    allow_unmeasured_scale: bool = False,
    image_token: str | None = None,
    add_rows: bool = False,
) -> dict[str, Any]:
    r"""
    Writes the folder of an untrained MMAR.

    Args:
        backbone (`str`): Local folder or repository of a Qwen2 or Qwen2.5.
        vae (`str` or `Path`): Folder of a diffusers `AutoencoderKL` with its measured scale.
        preset (`str`): Preset, or folder with a config.json, for everything but the language model and the VAE.
        out (`str` or `Path`): Folder to make.
        revision (`str`, *optional*): Of the backbone's repository.
        dtype (`str`, *optional*, defaults to `"auto"`): `"float32"`, `"bfloat16"`, `"float16"`, or the backbone's own.
        frozen (`str`, *optional*, defaults to `"include"`): `"reference"` leaves out the backbone and the VAE.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest weights file; what is in memory at a time.
        seed (`int`, *optional*, defaults to 0): Of the new weights.
        token (`str`, *optional*): For a repository that is not public.
        allow_unmeasured_scale (`bool`, *optional*, defaults to `False`): Take a VAE whose latent scale was never
            measured.
        image_token (`str`, *optional*): A token that the backbone's tokenizer reserves, such as `"<|image_pad|>"`, to
            stand for images. By default a new one, `"<|image|>"`, which takes a free row of the embedding.
        add_rows (`bool`, *optional*, defaults to `False`): Give the embedding and the head a row for the new token if
            none is free: the mean of the others, and frozen like them. Not with `frozen="reference"`.

    Returns:
        `dict`: Parameters by part, the image token's id, the number of added rows, the dtype, files and their bytes.

    Raises:
        ValueError: If a part is missing, broken or does not fit, the VAE's latent scale was never measured, or the
            image token has no row; nothing is left in `out` then.
    """
    if frozen not in ("include", "reference") or dtype not in ("auto", *DTYPES):
        raise ValueError(
            f"`frozen` must be 'include' or 'reference' and `dtype` one of auto, {', '.join(DTYPES)}; got "
            f"{shorten(frozen)} and {shorten(dtype)}."
        )
    check_shard_size(max_shard_size)
    backbone_folder = find_backbone(backbone, revision, token)
    config = _config(preset, backbone_folder, Path(vae))
    if not allow_unmeasured_scale:
        check_measured(config.vae_config, vae, "`vae`", "`allow_unmeasured_scale`")
    config.frozen_parts = {
        "backbone": make_reference("backbone", backbone, backbone_folder, revision),
        "vae": make_reference("vae", str(vae), Path(vae)),
    }
    processor = _processor(config, backbone_folder, image_token, add_rows, frozen)
    num_added_rows = max(len(processor.tokenizer) - config.text_config.vocab_size, 0)
    config.text_config.vocab_size += num_added_rows
    config.image_token_id = processor.image_token_id
    config.null_prompt_ids = list(processor.generation_inputs(None, return_tensors=None)["input_ids"][0])
    config.frozen_weights = frozen
    config.validate_architecture()

    parts = {
        "backbone": _Weights(weights_files("backbone", backbone_folder)),
        "vae": _Weights(weights_files("vae", Path(vae))),
    }
    with torch.device("meta"):
        model = model_class_of(config)(config)
    shapes = dict(model.state_dict())
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    sources = _sources(shapes, parts)
    torch_dtype = parts["backbone"].dtype("model.norm.weight") if dtype == "auto" else DTYPES[dtype]
    config.dtype = torch_dtype
    model.config.dtype = torch_dtype
    model.config.architectures = [type(model).__name__]
    if (backbone_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(backbone_folder)
    referenced = set(config.frozen_parts) if frozen == "reference" else set()
    files, index = _shards(model, torch_dtype, max_shard_size, referenced)

    own_dtypes = {name: torch.float32 if name.startswith("vae.") else torch_dtype for name in shapes}
    num_bytes = sum(shapes[name].numel() * own_dtypes[name].itemsize for names in files.values() for name in names)
    with new_folder(out, num_bytes) as folder:
        for file, names in tqdm(files.items(), desc="writing", unit=" files"):
            tensors = dict(_shard_tensors(names, model, sources, parts, torch_dtype, seed, num_added_rows))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            del tensors
        if index is not None:
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8", newline="\n")
        model.save_all_but_weights(folder, MMARPipeline(model, processor, model.default_scheduler()))
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_children()
        if name != "lm_head" or not config.tie_word_embeddings
    }
    return {
        "parameters": counts,
        "image_token_id": config.image_token_id,
        "added_rows": num_added_rows,
        "dtype": str(torch_dtype).removeprefix("torch."),
        "files": len(files),
        "bytes": written,
    }


def _config(preset: str, backbone: Path, vae: Path) -> MMARConfig:
    """The preset's config with the backbone's language model and the VAE's sizes and scale."""
    config = load_preset(preset)
    values = config.to_dict() | {
        "text_config": Qwen2Config.from_pretrained(backbone).to_dict(),
        "vae_config": load_vae_config(model_class_of(config).vae_class, vae),
        # The preset's is Qwen2's; Qwen2.5 has more tokens of its own. Set again below, by the tokenizer.
        "image_token_id": 0,
    }
    return type(config).from_dict(values)


def load_vae_config(vae_class: type[ModelMixin], vae: Path) -> dict[str, Any]:
    r"""
    Args:
        vae_class (`type[ModelMixin]`): Of the model's VAE.
        vae (`Path`): Folder of such a VAE.

    Returns:
        `dict`: Its arguments, complete.

    Raises:
        ValueError: If the folder is of another kind, or cannot be read.
    """
    # diffusers' own class, which converters write.
    expected = next(own for own in vae_class.__mro__ if own.__module__.startswith("diffusers."))
    try:
        vae_config = expected.load_config(vae)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected the folder of a diffusers {expected.__name__}; {shorten(str(vae))} cannot be read "
            f"({shorten(error)}). `mmar convert kl16` makes an AutoencoderKL, `mmar convert vq16` a VQModel."
        ) from error
    if vae_config.get("_class_name") not in {own.__name__ for own in vae_class.__mro__}:
        kind = vae_config.get("_class_name") or vae_config.get("model_type")
        raise ValueError(
            f"expected {'an' if expected is AutoencoderKL else 'a'} {expected.__name__} in {shorten(str(vae))}; got "
            f"{shorten(kind)}. MMAR's tokens are continuous, from a KL autoencoder; those of "
            "the VQ ablation are a VQModel's."
        )
    with torch.device("meta"):
        # With the defaults of what the file leaves out.
        vae_config = expected.from_config(vae_config).config
    return {key: value for key, value in vae_config.items() if not key.startswith("_")}


def _processor(
    config: MMARConfig, backbone: Path, image_token: str | None, add_rows: bool, frozen: str
) -> MMARProcessor:
    if not any((backbone / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"expected Qwen2's tokenizer files in {shorten(str(backbone))}; there is no tokenizer.json or vocab.json. "
            "Copy or download the folder whole."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected Qwen2's tokenizer files in {shorten(str(backbone))}; they cannot be read ({shorten(error)})."
        ) from error
    if len(tokenizer) > (num_rows := config.text_config.vocab_size):
        raise ValueError(
            f"the backbone's embedding must have a row for each of the {len(tokenizer)} tokens of its tokenizer; got "
            f"{num_rows} rows in {shorten(str(backbone))}. Copy config, weights and tokenizer from one place."
        )
    reserved = _reserved_tokens(tokenizer, config.text_config)
    if image_token is not None and image_token not in reserved:
        raise ValueError(
            "`image_token` must be a token that the backbone's tokenizer reserves and does not use, one of "
            f"{shorten_names(reserved) or 'none'}; got {shorten(image_token)}. Take one of these, or leave it out."
        )
    processor = MMARProcessor(
        MMARImageProcessor(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        num_image_tokens=config.num_latents,
        image_token=IMAGE_TOKEN if image_token is None else image_token,
    )
    if len(processor.tokenizer) > num_rows and not (add_rows and frozen == "include"):
        ways = [f"`image_token`, one of the tokenizer's reserved {shorten_names(reserved)}"] if reserved else []
        # The embedding with the rows would be another than the one that the reference names.
        ways.append("`add_rows`" if frozen == "include" else "`add_rows` with `frozen='include'`")
        raise ValueError(
            f"the backbone's embedding must have a free row for the image token {shorten(processor.image_token)}; got "
            f"{num_rows} rows, all taken by its tokenizer. Pass {', or '.join(ways)}."
        )
    return processor


def _reserved_tokens(tokenizer: PreTrainedTokenizerBase, text_config: Qwen2Config) -> list[str]:
    """Special tokens that stand for nothing in a text or a chat; first those that are named after images."""
    used = {TURN_START, TURN_END, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special_ids = (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id)
    used_ids = {i for ids in special_ids for i in (ids if isinstance(ids, list) else [ids])}
    template = str(tokenizer.chat_template)
    names = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in used and number not in used_ids and token.content not in template
    ]
    return sorted(names, key=lambda name: "image" not in name)

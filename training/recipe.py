"""
Recipes: the settings of a training in a YAML file, and `key=value` on the command line, which wins.

A recipe holds fields of `DataArguments` and of `MMARTrainingArguments`, which are transformers' and MMAR's own. The
paths, `model`, `data`, `latents` and `output_dir`, are given on the command line and stand in no recipe. `data`, and
`eval_data` too, is one source of rows, or a YAML file that lists several (`read_sources`).
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy

from ..modeling_mmar.configuration_mmar import shorten
from ..processors.processing_mmar import TASKS
from .trainer import MMARTrainingArguments


# Given on the command line, whatever the recipe.
REQUIRED = ("model", "data", "output_dir")
FROZEN_DTYPES = ("float32", "bfloat16")
# Of a YAML file, its anchors unfolded.
MAX_YAML_NODES = 100_000
# Largest count in a recipe, such as samples per step; beyond it lists of its divisors take minutes.
MAX_COUNT = 2**31 - 1
# Endings of a path that names files, and not a data set of the Hub.
FILE_ENDINGS = (".parquet", ".tar", ".json", ".jsonl")
YAML_ENDINGS = (".yaml", ".yml")


@dataclass
class DataArguments:
    """What to train on, how the tasks are drawn, and what else is no field of `TrainingArguments`."""

    model: str = field(metadata={"help": "folder or repository of an MMAR"})
    data: str = field(metadata={"help": "a source of rows, or a YAML file that lists several"})
    latents: str | None = field(default=None, metadata={"help": "folder of the cached latents of a single source"})
    streaming: bool = field(default=False, metadata={"help": "read rows one after the other, not by number"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "rows of a stream of which the next one is drawn"})
    eval_data: str | None = field(default=None, metadata={"help": "held-out rows, as `data`, for `eval_strategy`"})
    num_eval_samples: int | None = field(default=None, metadata={"help": "samples of an evaluation; all rows if null"})
    task_weights: list[float] = field(
        default_factory=lambda: [0.5, 0.45, 0.05], metadata={"help": "of text to image, image to text, unconditional"}
    )
    mask_ratio_min: float = field(default=0.7, metadata={"help": "lower bound of the mask ratio"})
    mask_ratio_per_batch: bool = field(
        default=False, metadata={"help": "one mask ratio per micro-batch, as MAR, and not per sample"}
    )
    swap_rate: float = field(default=0.0, metadata={"help": "share of answers with another row's content in them"})
    diffusion_batch_mul: int = field(default=4, metadata={"help": "timesteps drawn per z"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of transformers to train with"})
    frozen_dtype: str = field(
        default="float32", metadata={"help": "dtype of the frozen weights of the backbone; trained ones are float32"}
    )
    total_batch_size: int | None = field(
        default=None, metadata={"help": "samples per optimizer step, over all processes and micro-batches"}
    )
    resume: bool = field(default=True, metadata={"help": "go on from the last checkpoint in output_dir"})

    def __post_init__(self):
        self.task_weights = check_task_weights(self.task_weights, "`task_weights`")
        if not 0 <= self.mask_ratio_min < 1:
            raise ValueError(f"`mask_ratio_min` must be in [0, 1); got {shorten(self.mask_ratio_min)}.")
        if not 0 <= self.swap_rate <= 1:
            raise ValueError(f"`swap_rate` must be in [0, 1]; got {shorten(self.swap_rate)}.")
        if self.frozen_dtype not in FROZEN_DTYPES:
            raise ValueError(
                f"`frozen_dtype` must be one of {', '.join(FROZEN_DTYPES)}; got {shorten(self.frozen_dtype)}."
            )
        for name in ("diffusion_batch_mul", "shuffle_buffer", "total_batch_size", "num_eval_samples"):
            value, may_be_none = getattr(self, name), name in ("total_batch_size", "num_eval_samples")
            if (type(value) is not int or not 1 <= value <= MAX_COUNT) and not (may_be_none and value is None):
                is_large = type(value) is int and value > MAX_COUNT
                limit = f"at most {MAX_COUNT}" if is_large else "at least 1"
                raise ValueError(f"`{name}` must be an integer of {limit}; got {shorten(value)}.")
        by_number = {
            "latents": self.latents is not None,
            "mask_ratio_per_batch": self.mask_ratio_per_batch,
            "swap_rate": self.swap_rate > 0,
        }
        if self.streaming and (given := [name for name, is_given in by_number.items() if is_given]):
            raise ValueError(_not_in_streams(given))


@dataclass
class SourceArguments:
    r"""
    A source of training rows.

    Args:
        path (`str`): File, pattern, folder or data set (sources.py).
        name (`str`): For reports; no two sources have the same.
        weight (`float`, *optional*, defaults to 1.0): Share of the samples, in proportion to those of the others.
        task_weights (`list[float]`, *optional*): Of its samples; those of the recipe by default.
        columns (`dict[str, str]`, *optional*): Keys of a training row -> columns of the source, None for none.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set that has several.
        image_folder (`str`, *optional*): Where relative paths of pictures start; the folder of their file by default.
        latents (`str`, *optional*): Folder of its cached latents.
    """

    path: str
    name: str
    weight: float = 1.0
    task_weights: list[float] | None = None
    columns: dict[str, str | None] | None = None
    split: str = "train"
    image_folder: str | None = None
    latents: str | None = None

    def __post_init__(self):
        for key in ("path", "name", "split", "image_folder", "latents"):
            value, may_be_none = getattr(self, key), key in ("image_folder", "latents")
            if not (isinstance(value, str) and value.strip()) and not (may_be_none and value is None):
                raise ValueError(f"`{key}` of a source must be a text; got {shorten(value)}.")
        where = f"of the source {shorten(self.name)}"
        if not _are_numbers([self.weight]) or not 0 < self.weight < math.inf:
            raise ValueError(
                f"`weight` {where} must be a number above 0; got {shorten(self.weight)}. Drop unused sources."
            )
        self.weight = float(self.weight)
        if self.task_weights is not None:
            self.task_weights = check_task_weights(self.task_weights, f"`task_weights` {where}")
        columns = {} if self.columns is None else self.columns
        are_names = isinstance(columns, dict) and all(isinstance(key, str) for key in columns)
        if not are_names or not all(name is None or isinstance(name, str) for name in columns.values()):
            raise ValueError(
                f"`columns` {where} must name a column for each key, such as {{image: jpg, captions: txt}}; got "
                f"{shorten(columns)}."
            )


def _not_in_streams(names: list[str]) -> str:
    """What to say of settings that need rows by number."""
    return (
        f"{', '.join(f'`{name}`' for name in names)} must not be set with `streaming=true`, which has no rows by "
        "number. Drop one or the other."
    )


def check_task_weights(weights: Any, name: str) -> list[float]:
    """The weights as floats; raises a `ValueError` if they are not one number per task, or not proportions."""
    proportions = _are_numbers(weights) and len(weights) == len(TASKS) and all(weight >= 0 for weight in weights)
    if not proportions or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"{name} must be three numbers of at least 0, not all 0: text to image, image to text, unconditional; got "
            f"{shorten(weights)}."
        )
    return [float(weight) for weight in weights]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)


# The recipe

PARTS = (DataArguments, MMARTrainingArguments)


def parse(arguments: list[str]) -> tuple[DataArguments, MMARTrainingArguments]:
    r"""
    Reads a recipe and the overrides after it.

    Args:
        arguments (`list[str]`): The recipe's path, or the name of one that is shipped, then `key=value`; a value is
            YAML, such as `[0.9, 0, 0.1]` or null.

    Returns:
        `tuple` of `DataArguments` and `MMARTrainingArguments`.

    Raises:
        ValueError: If there is no recipe, an override is not `key=value`, a key is unknown, given twice or missing, a
            value is not of its field's type or range, or two values contradict each other.
    """
    values = read_recipe(find_recipe(arguments[0] if arguments else ""))
    for argument in arguments[1:]:
        key, found, value = argument.partition("=")
        if not found:
            raise ValueError(f"expected key=value after the recipe; got {shorten(argument)}.")
        values[key] = read_yaml(value, key)
    kinds = _kinds()
    own = [f.name for f in dataclasses.fields(DataArguments)]
    refuse_unknown(values, kinds, "a recipe", f"{', '.join(own)} and the fields of MMARTrainingArguments")
    if missing := [key for key in REQUIRED if values.get(key) is None]:
        raise ValueError(f"the training needs {', '.join(missing)}; give them as key=value.")
    given = set(values)
    values = {name: _typed(name, value, kinds[name]) for name, value in values.items()}
    data_args, args = HfArgumentParser(PARTS).parse_dict(values)
    _check_together(data_args, args, given)
    return data_args, args


def _kinds() -> dict[str, Any]:
    """All keys of a recipe with their types: not the fields' own, which HfArgumentParser changes."""
    return {f.name: get_type_hints(part)[f.name] for part in PARTS for f in dataclasses.fields(part)}


def find_recipe(name: str) -> Path:
    r"""
    Args:
        name (`str`): Path of a recipe, or the name of one that is shipped, such as `"mmar_0_5b_stage1"`.

    Returns:
        `Path`: Its file.

    Raises:
        ValueError: If it is neither; names those that are shipped.
    """
    if Path(name).is_file():
        return Path(name)
    # `training/recipes` and `ablations/recipes`.
    shipped = {path.stem: path for path in sorted(Path(__file__).parents[1].glob("*/recipes/*.yaml"))}
    if name.removesuffix(".yaml") not in shipped:
        raise ValueError(
            f"`recipe`, the first argument, must be a YAML file or one of {', '.join(shipped)}; got {shorten(name)}."
        )
    return shipped[name.removesuffix(".yaml")]


def describe_keys() -> str:
    """All keys that a recipe may hold, one a line, with their types, defaults and, where it is known, their help."""
    lines = []
    for part in PARTS:
        for entry in sorted(dataclasses.fields(part), key=lambda entry: entry.name):
            kind = get_type_hints(part)[entry.name]
            default = entry.default
            if entry.default_factory is not dataclasses.MISSING:
                default = entry.default_factory()
            about = f"{entry.name}: {kind.__name__ if isinstance(kind, type) else kind}".replace("typing.", "")
            about += "" if default is dataclasses.MISSING else f" = {default!r}"
            about += f"  # {entry.metadata['help']}" if entry.metadata.get("help") else ""
            lines.append(" ".join(about.split()))
    return "\n".join(lines)


def read_recipe(path: str | Path) -> dict[str, Any]:
    r"""
    Args:
        path (`str` or `Path`): A YAML file of `key: value` lines.

    Returns:
        `dict`: The values as YAML has them, not checked yet.

    Raises:
        ValueError: If it is no such file, or has a key twice.
    """
    values = read_yaml(_read(path), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"expected a recipe of `key: value` lines in {path}; got a {type(values).__name__}.")
    return values


def refuse_unknown(keys: Iterable[Hashable], known: Iterable[str], what: str, allowed: str | None = None) -> None:
    r"""
    Args:
        keys (`Iterable`): Keys that were given.
        known (`Iterable[str]`): Those that there are.
        what (`str`): Whose keys; for the message.
        allowed (`str`, *optional*): The keys that there are, in words; their list by default.

    Raises:
        ValueError: If a key is unknown; names those that look like it.
    """
    known = list(known)
    if not (unknown := [str(key) for key in keys if key not in known]):
        return
    # Ten of them, and the beginnings of long ones, show what is wrong.
    near = {key: difflib.get_close_matches(key[:100].lstrip("-"), known, n=3) for key in unknown[:10]}
    hints = [shorten(key) + (f" (near: {', '.join(names)})" if names else "") for key, names in near.items()]
    raise ValueError(
        f"{what} may hold {allowed or ', '.join(known)}; got {', '.join(hints)}. Correct or drop the key."
    )


def _check_together(data_args: DataArguments, args: MMARTrainingArguments, given: set[str]) -> None:
    """Raises a `ValueError` if there is nothing to train on, or two values, each good, do not go together."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1; got {getattr(args, name)}.")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(
            f"`num_train_epochs` must be above 0 where there is no `max_steps`; got {args.num_train_epochs}."
        )
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "a training goes on from the last whole checkpoint of `output_dir` by itself; got "
            f"`resume_from_checkpoint`, {shorten(args.resume_from_checkpoint)}. Drop it, or give the checkpoint as "
            "`model`."
        )
    if data_args.eval_data is not None and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "`eval_data` is measured with an `eval_strategy` only; got none. Set `eval_strategy=steps` and "
            "`eval_steps`, or drop it."
        )
    if data_args.total_batch_size is not None and "gradient_accumulation_steps" in given:
        raise ValueError(
            "`gradient_accumulation_steps` follows from `total_batch_size` and the number of processes; got both. "
            "Drop it, or set `total_batch_size=null`."
        )
    if data_args.frozen_dtype != "float32" and args.mixed_precision != "bf16":
        raise ValueError(
            "`frozen_dtype` must be float32 without `bf16=true`, since trained weights are float32; got "
            f"{shorten(data_args.frozen_dtype)}. Set `frozen_dtype=float32` or `bf16=true`."
        )
    if data_args.streaming and args.sort_by_length:
        raise ValueError(_not_in_streams(["sort_by_length"]))
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` must be above 0 with `streaming=true`, since a stream does not tell its length; got "
            f"{args.max_steps}. Set it to epochs * rows / `total_batch_size`."
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without keys that are given twice; PyYAML itself takes the last one, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected a text file in UTF-8 at {shorten(str(path))}; it cannot be read ({shorten(error)})."
        ) from error


def read_yaml(text: str, name: str) -> Any:
    r"""
    Args:
        text (`str`): YAML; keys that are given twice, and tags that name Python objects, are refused.
        name (`str`): Where it is from, for the message.

    Returns:
        The values.

    Raises:
        ValueError: If it is no YAML, is nested too deep, or unfolds by its anchors to more than `MAX_YAML_NODES`.
    """
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        num_nodes = 0 if node is None else _num_nodes(node, {})
        if num_nodes <= MAX_YAML_NODES:
            return None if node is None else loader.construct_document(node)
    # ValueError: such as a date that there is not.
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"expected YAML in {shorten(name)}; it cannot be read ({shorten(error)}).") from error
    except RecursionError as error:
        raise ValueError(f"expected YAML in {shorten(name)}; it is nested too deep. Flatten it.") from error
    raise ValueError(
        f"expected at most {MAX_YAML_NODES} values in {shorten(name)}; its anchors unfold to more. Write them out, or "
        "drop some."
    )


def _num_nodes(node: yaml.Node, counted: dict[int, float]) -> float:
    """Values that a node unfolds to, with those of its anchors each time; infinity if one holds itself."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        counted[id(node)] = 1 + sum(_num_nodes(part, counted) for part in pairs)
    return counted[id(node)]


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a recipe as its field's type; YAML 1.1 reads 1e-3 as text, and any text as true."""
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    if value is None and (NoneType in kinds or not kinds & {bool, int, float, str}):
        return value
    if choices := [str(choice.value) for k in kinds if isinstance(k, type) and issubclass(k, Enum) for choice in k]:
        # `false`, `no` and `off` are one value in YAML 1.1.
        text = "no" if value is False and "no" in choices else value
        if text not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {shorten(value)}.")
        return text
    if kinds - {NoneType} == {str} and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text; got {shorten(value)}.")
    expected = next((k for k in (bool, int, float) if k in kinds), None)
    if expected is None or (str in kinds and value is not None):
        return value
    if expected is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    elif type(value) is expected or (expected is int and float in kinds and type(value) is float):
        return value
    example = {bool: "true or false", int: "an integer", float: "a number"}[expected]
    raise ValueError(f"`{name}` must be {example}; got {shorten(value)}.")


# The sources


def read_sources(
    data: str, latents: str | None = None, streaming: bool = False, option: str = "data"
) -> list[SourceArguments]:
    r"""
    The sources that `data` names: itself, or those of a YAML file, a list of

        - path: captions/*.parquet
          name: captions
          weight: 20.0
          task_weights: [0.5, 0.45, 0.05]
          columns: {image: jpg, captions: txt}
          split: train
          image_folder: pictures
          latents: latents/captions

    of which only `path` must be given. Relative paths are relative to the YAML file. A `path` that exists, begins with
    a dot or names files (`*.parquet`, `*.tar`, `*.json`, `*.jsonl`) is one; others are data sets of the Hub.

    Args:
        data (`str`): As `DataArguments.data`.
        latents (`str`, *optional*): As `DataArguments.latents`.
        streaming (`bool`, *optional*, defaults to `False`): As `DataArguments.streaming`.
        option (`str`, *optional*, defaults to `"data"`): What names the sources, for errors.

    Returns:
        `list[SourceArguments]`: At least one.

    Raises:
        ValueError: If the YAML file is missing or not built so, a key is unknown, two sources have one name, `latents`
            are given for several sources, or a source has latents and is to be streamed.
    """
    if not data.endswith(YAML_ENDINGS):
        return [SourceArguments(path=data, name=_default_name(data), latents=latents)]
    if not Path(data).is_file():
        raise ValueError(
            f"expected a YAML file of sources as `{option}`; there is none at {shorten(data)}. Check the path."
        )
    if latents is not None:
        raise ValueError(
            f"`latents` are those of a single source; {data} lists several. Write `latents: FOLDER` beside the `path` "
            "that it belongs to."
        )
    entries = read_yaml(_read(data), data)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"expected a list of sources, each with a `- path:`, in {data}; got {shorten(entries)}.")
    sources = [_source(entry, number, Path(data)) for number, entry in enumerate(entries, start=1)]
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"sources must have names of their own; {', '.join(twice)} stands twice in {data}. Add `name`."
        )
    if streaming and any(source.latents is not None for source in sources):
        raise ValueError(f"{data}: {_not_in_streams(['latents'])}")
    return sources


def _source(entry: dict[str, Any], number: int, file: Path) -> SourceArguments:
    """One entry of the YAML file `file`."""
    refuse_unknown(entry, [f.name for f in dataclasses.fields(SourceArguments)], f"source {number} of {file}")
    entry = {key: value for key, value in entry.items() if value is not None}
    if not isinstance(path := entry.get("path"), str):
        raise ValueError(f"source {number} of {file} must have a `path`, a text; got {shorten(path)}.")
    entry.setdefault("name", _default_name(path))
    is_file = path.startswith(("./", "../")) or path.endswith(FILE_ENDINGS) or (file.parent / path).exists()
    if is_file and "://" not in path:
        entry["path"] = str(file.parent / path)
    for key in ("image_folder", "latents"):
        if isinstance(entry.get(key), str):
            entry[key] = str(file.parent / entry[key])
    if isinstance(entry.get("weight"), str):
        # 1e-3 is a text in YAML 1.1.
        entry["weight"] = _typed("weight", entry["weight"], float)
    return SourceArguments(**entry)


def _default_name(path: str) -> str:
    return Path(path).name or path


# Batches


def accumulation_steps(total_batch_size: int, per_device_train_batch_size: int, world_size: int) -> int:
    r"""
    Micro-batches of an optimizer step, so that it has as many samples as the recipe says.

    Args:
        total_batch_size (`int`): Samples per optimizer step.
        per_device_train_batch_size (`int`): Samples per micro-batch of a process.
        world_size (`int`): Processes.

    Returns:
        `int`: `gradient_accumulation_steps`.

    Raises:
        ValueError: If it is not a whole number; names what would be.
    """
    at_once = per_device_train_batch_size * world_size
    if total_batch_size % at_once == 0:
        return total_batch_size // at_once
    if total_batch_size % world_size == 0:
        per_process = total_batch_size // world_size
        ways = [str(size) for size in range(1, per_process + 1) if per_process % size == 0]
        remedy = f"Set `per_device_train_batch_size` to one of {', '.join(ways)}."
    else:
        below = total_batch_size // world_size * world_size
        totals = [str(total) for total in (below, below + world_size) if total > 0]
        divisors = [size for size in range(1, total_batch_size + 1) if total_batch_size % size == 0]
        counts = [max(d for d in divisors if d < world_size)] + [d for d in divisors if d > world_size][:1]
        remedy = (
            f"Start {' or '.join(map(str, counts))} processes, or set `total_batch_size` to {' or '.join(totals)}."
        )
    raise ValueError(
        f"`total_batch_size` must be a multiple of `per_device_train_batch_size` times the number of processes, "
        f"{per_device_train_batch_size} x {world_size} = {at_once}; got {total_batch_size}. {remedy}"
    )

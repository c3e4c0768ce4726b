"""Writes MMAR's code beside its weights, so that a folder or Hub repository opens where MMAR is not installed.

The folder is flat: transformers and diffusers copy a file and what it imports by a line with one leading dot, nothing
in sub-folders. diffusers follows such lines from file to file without remembering where it was, so that they must not
form a circle; and from a local folder it copies only what the first file names. Therefore it gets a first file of its
own, `ENTRY_MODULE`, which names all the others and is named by none.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # Named, so that whoever loads the model has these files too, and can save the whole folder again.
    from ..pipelines.pipeline_mmar import MMARPipeline  # noqa: F401
    from ..pipelines.text_to_image_mmar import MMARTextToImagePipeline  # noqa: F401
    from ..processors.processing_mmar import MMARProcessor  # noqa: F401


# What is exported, by folder of the installed package.
REMOTE_MODULES = {
    "conversion": ("card_mmar", "hub_mmar", "push_mmar"),
    "modeling_mmar": (
        "checks_mmar",
        "configuration_mmar",
        "diffusion_mmar",
        "embedding_vit_mmar",
        "fast_generation_mmar",
        "frozen_parts_mmar",
        "generation_mmar",
        "masking_mmar",
        "modeling_mmar",
        "parameterization_mmar",
        "plora_mmar",
        "prefix_mmar",
        "quantization_mmar",
    ),
    "pipelines": ("pipeline_mmar", "text_to_image_mmar"),
    "processors": ("image_processing_mmar", "processing_mmar"),
}

# Where a subclass has modules of its own, which go to its folders only.
SUBCLASS_FOLDER = "ablations"

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


def export_remote_code(folder: str | Path, subclass_modules: tuple[str, ...] = ()) -> None:
    r"""
    Writes MMAR's modules into a folder, flat.

    Works from the installed package and from exported code alike, with the same result.

    Args:
        folder (`str` or `Path`): Where to; exists.
        subclass_modules (`tuple[str]`, *optional*): Modules of a model that builds on MMAR, to be written too.

    Raises:
        FileNotFoundError: If exported code does not hold all modules.
    """
    folder = Path(folder)
    # Read before writing: the folder may be the one that the code runs from.
    texts = {path.name: _flat(path.read_text(encoding="utf-8")) for path in _module_paths(subclass_modules)}
    texts[f"{ENTRY_MODULE}.py"] = _entry_text(subclass_modules)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _module_paths(subclass_modules: tuple[str, ...]) -> Iterator[Path]:
    here = Path(__file__).resolve().parent
    is_flat = (here / "modeling_mmar.py").is_file()
    for subfolder, modules in (*REMOTE_MODULES.items(), (SUBCLASS_FOLDER, subclass_modules)):
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


def _entry_text(subclass_modules: tuple[str, ...]) -> str:
    """The text of `ENTRY_MODULE`."""
    names = sorted(module for modules in (*REMOTE_MODULES.values(), subclass_modules) for module in modules)
    return _ENTRY_TEMPLATE.format(lines="".join(f"    from .{name} import *  # noqa: F403\n" for name in names))

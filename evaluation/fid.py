"""
FID-30K: the Frechet distance of Inception features between pictures drawn from COCO's captions and real pictures.

    mmar evaluate fid MODEL --captions captions_val2014.json --real val2014 \
        --inception_weights weights-inception-2015-12-05-6726825d.pth --out runs/fid
    torchrun --nproc_per_node 8 -m mmar evaluate fid MODEL ...

Captions are any file in COCO's layout. Of each picture of it one caption is taken, then of each a second one, and so
on, in an order that --caption_seed makes, until there are --num_prompts. Real pictures are all files of a folder,
whatever was captioned, cut to squares of the drawn pictures' size; or the statistics of them: an .npz with mu and
sigma, such as the real.npz that this command leaves in its folder, or a file of torch-fidelity's cache.

torch-fidelity computes the features and the distance. The weights are a local file, as torch-fidelity publishes it or
as safetensors, and are read as tensors only. --extractor names another `FeatureExtractorBase`, as module:Class.

The folder holds drawing.json, captions.jsonl, pictures/, real.npz and result.json. A run that was stopped is started
again with the same words and goes on where it was.
"""

import hashlib
import importlib
import io
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import __version__
from ..files import write_whole
from ..modeling_mmar.configuration_mmar import shorten
from ..processors.image_processing_mmar import read_rgb_image
from ..training.mixture import stable_hash
from .drawing import OPTIONS, DrawingOptions, Processes, draw_with, write_json, write_lines


# What the field reports; the distance of fewer pictures is larger.
NUM_PROMPTS = 30_000
INCEPTION = "inception-v3-compat"
PICTURE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
STATISTICS_ENDINGS = (".npz", ".pt")
# Of a reason in a message.
MAX_REASON_LENGTH = 300
# Uses of `stable_hash` by one seed.
PICTURE_ORDER, CAPTION_ORDER = range(2)


def torch_fidelity() -> Any:
    """The module torch_fidelity; raises a `ValueError` that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch_fidelity")
    # A torchvision that was built for another torch raises a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"expected torch-fidelity, which computes the FID; importing it failed ({shorten(error)}). Install it "
            "with "
            '`pip install "mmar[eval]"`, beside a torchvision that was built for your torch.'
        ) from error


# ----------------------------------------------------------------------------------------------------------- captions


def read_captions(path: Path) -> list[dict[str, Any]]:
    r"""
    Reads captions in COCO's layout.

    Args:
        path (`Path`): A JSON file with `annotations`, of which each has `id`, `image_id` and `caption`.

    Returns:
        `list[dict]`: Those three of each annotation.

    Raises:
        ValueError: If there is no such file, or something else is in it.
    """
    layout = "captions in COCO's layout ({'annotations': [{'id': 1, 'image_id': 2, 'caption': 'a dog'}, ...]})"
    if not path.is_file():
        raise ValueError(f"expected {layout}; there is no file {shorten(str(path))}.")
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        rows = [
            {"id": int(row["id"]), "image_id": int(row["image_id"]), "caption": row["caption"].strip()}
            for row in annotations
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected {layout} in {shorten(str(path))}; got something else ({type(error).__name__}: "
            f"{shorten(error)}). Name one of COCO's captions_*.json."
        ) from error
    if empty := [row["id"] for row in rows if not row["caption"]]:
        raise ValueError(
            f"expected a caption in each annotation of {shorten(str(path))}; that of {empty[0]} is empty."
        )
    if not rows:
        raise ValueError(f"expected {layout} in {shorten(str(path))}; it has no annotations.")
    return rows


def choose_captions(rows: Sequence[dict[str, Any]], num_prompts: int, seed: int = 0) -> list[dict[str, Any]]:
    r"""
    Chooses captions: one of each picture first, then a second one of each, and so on. Pictures, and the captions of
    one, come in an order that depends on the seed and their ids only, so that fewer are the first of more.

    Args:
        rows (`Sequence[dict]`): As `read_captions` returns them.
        num_prompts (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Of the order.

    Returns:
        `list[dict]`: The chosen rows.

    Raises:
        ValueError: If there are not so many.
    """
    if not 2 <= num_prompts <= len(rows):
        raise ValueError(
            f"`num_prompts` must be between 2, the least that has a covariance, and {len(rows)}, the number of "
            f"captions; got {num_prompts}."
        )
    captions: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (stable_hash(seed, CAPTION_ORDER, row["id"]), row["id"])):
        captions.setdefault(row["image_id"], []).append(row)
    pictures = sorted(captions, key=lambda picture: (stable_hash(seed, PICTURE_ORDER, picture), picture))
    most = max(map(len, captions.values()))
    rounds = (captions[p][place] for place in range(most) for p in pictures if place < len(captions[p]))
    return [row for row, _ in zip(rounds, range(num_prompts), strict=False)]


# ----------------------------------------------------------------------------------------------------------- features


def _reason(error: Exception) -> str:
    """A reader's error in one line; torch's, of a file that is no plain data, would advise to run what is in it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is broken, or holds code, which was not run"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_weights(path: Path) -> dict[str, Tensor]:
    r"""
    Reads weights as tensors and nothing else, whatever else is in the file.

    Args:
        path (`Path`): safetensors, or what `torch.save` wrote of a dict of tensors.

    Returns:
        `dict[str, torch.Tensor]`: The tensors.

    Raises:
        ValueError: If there is no such file, or something else than tensors in it.
    """
    if not path.is_file():
        raise ValueError(
            f"expected the weights of Inception; there is no file {shorten(str(path))}. It is "
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("not all of it are tensors by name")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"expected tensors by name in {shorten(str(path))}, as torch.save or safetensors writes them; got "
            f"something else ({_reason(error)}). Name another file."
        ) from error
    return weights


def open_extractor(name: str | None, weights: Path | None, device: torch.device) -> nn.Module:
    r"""
    Makes the feature extractor.

    Args:
        name (`str`, *optional*): Module and class of a `torch_fidelity.FeatureExtractorBase`, as `"module:Class"`;
            torch-fidelity's Inception by default.
        weights (`Path`, *optional*): Of Inception.
        device (`torch.device`): Where it computes.

    Returns:
        `torch_fidelity.FeatureExtractorBase`: With the one kind of features that it has for FID.

    Raises:
        ValueError: If both or neither of `name` and `weights` are given, or what they name is not there or of another
            kind.
    """
    if (name is None) == (weights is None):
        raise ValueError(
            "expected either `inception_weights`, a file with the weights of Inception, or another `extractor`; got "
            f"{'neither' if name is None else 'both'}."
        )
    fidelity = torch_fidelity()
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    if name is not None:
        module, _, kind = name.partition(":")
        try:
            extractor = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                "`extractor` must name a module that can be imported and a class in it, as module:Class; got "
                f"{shorten(name)} ({shorten(error)})."
            ) from error
        if not isinstance(extractor, type) or not issubclass(extractor, fidelity.FeatureExtractorBase):
            raise ValueError(
                f"`extractor` must be a class of torch_fidelity.FeatureExtractorBase; got {shorten(name)}."
            )
        registered = f"{module}-{kind}"
        if FEATURE_EXTRACTORS_REGISTRY.get(registered) is not extractor:
            fidelity.register_feature_extractor(registered, extractor)
        features = extractor.get_default_feature_layer_for_metric("fid")
        return create_feature_extractor(registered, [features], cuda=False, verbose=False).to(device)

    tensors = read_weights(weights)
    features = fidelity.FeatureExtractorInceptionV3.get_default_feature_layer_for_metric("fid")
    # torch-fidelity unpickles whatever is in the file, so it gets one that was written here.
    with tempfile.TemporaryDirectory() as folder:
        safe = str(Path(folder) / "weights.pth")
        torch.save(dict(tensors), safe)
        try:
            return create_feature_extractor(
                INCEPTION, [features], cuda=False, verbose=False, feature_extractor_weights_path=safe
            ).to(device)
        except RuntimeError as error:
            # The first line only says that there are more.
            reason = str(error).splitlines()[-1].strip()[:MAX_REASON_LENGTH]
            raise ValueError(
                f"expected the weights of torch-fidelity's Inception in {shorten(str(weights))}; got those of another "
                f"network ({reason})."
            ) from error


class SquarePictures(Dataset):
    r"""
    Pictures as squares of bytes.

    Args:
        files (`list[Path]`): The pictures.
        size (`int`): Edge of the squares: the shorter edge is scaled to it by Pillow's antialiased bicubic filter, and
            the middle is cut out. A picture of that very size stays as it is.
    """

    def __init__(self, files: list[Path], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        """A `torch.ByteTensor` of shape `(3, size, size)`, or what is wrong with the file."""
        try:
            square = read_rgb_image(self.files[index])
            if square.size != (self.size, self.size):
                square = ImageOps.fit(square, (self.size, self.size), Image.Resampling.BICUBIC)
        except ValueError as error:
            return (
                f"expected a picture at {shorten(str(self.files[index]))}; it cannot be read ({shorten(error)}). Mend "
                "or remove it."
            )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def statistics_of(pictures: SquarePictures, extractor: nn.Module, batch_size: int, num_workers: int) -> dict[str, Any]:
    r"""
    Mean and covariance of the pictures' features.

    Args:
        pictures (`SquarePictures`): At least two.
        extractor (`torch_fidelity.FeatureExtractorBase`): With one kind of features.
        batch_size (`int`): Pictures per pass.
        num_workers (`int`): Processes that read pictures; none if 0.

    Returns:
        `dict[str, np.ndarray]`: `"mu"` of shape `(D,)` and `"sigma"` of shape `(D, D)`, float64.

    Raises:
        ValueError: If a picture cannot be read.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    device = next((p.device for p in (*extractor.parameters(), *extractor.buffers())), torch.device("cpu"))
    loader = DataLoader(pictures, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
    parts = []
    with torch.no_grad(), tqdm(total=len(pictures), unit=" pictures", desc="features", delay=2) as bar:
        for batch in loader:
            if wrong := next((entry for entry in batch if isinstance(entry, str)), None):
                raise ValueError(wrong)
            parts.append(extractor(torch.stack(batch).to(device))[0].double().cpu())
            bar.update(len(batch))
    # torch-fidelity's means are of float32 features, in float32; over tens of thousands double is nearer to the truth.
    return fid_features_to_statistics(torch.cat(parts))


# --------------------------------------------------------------------------------------------------------- statistics


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, by name; raises a `ValueError` if there are not at least two."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
    if len(files) < 2:
        raise ValueError(
            f"expected at least 2 real pictures ({', '.join(PICTURE_ENDINGS)}) in {shorten(str(folder))}; got "
            f"{len(files)}."
        )
    return files


def read_statistics(path: Path) -> dict[str, Any]:
    r"""
    Reads statistics of features, as arrays and nothing else.

    Args:
        path (`Path`): .npz with `mu` and `sigma`, or a `...-stat-fid-...pt` of torch-fidelity's cache.

    Returns:
        `dict`: `"mu"` of shape `(D,)` and `"sigma"` of shape `(D, D)`, float64, and `"about"`, what `real.npz` says of
        itself, or None.

    Raises:
        ValueError: If something else is in it.
    """
    about = None
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
                about = json.loads(str(arrays["about"])) if "about" in arrays else None
        else:
            # All that a pickled array of numbers names.
            rebuild = np.zeros(1).__reduce__()[0]
            names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
            dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
            with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *dtypes]):
                entries = torch.load(path, map_location="cpu", weights_only=True)
            mu, sigma = (np.asarray(entries[name], np.float64) for name in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"their shapes are {mu.shape} and {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("they are NaN or infinite in places")
    except (pickle.UnpicklingError, RuntimeError, TypeError, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"expected `mu` (D,) and `sigma` (D, D) in {shorten(str(path))}; got something else ({_reason(error)}). "
            "Name an .npz of them, a -stat-fid- file of torch-fidelity's cache, or a folder of pictures."
        ) from error
    return {"mu": mu, "sigma": sigma, "about": about}


def _check_real(path: Path) -> None:
    """Raises a `ValueError` if there are no real pictures or statistics."""
    if path.is_dir():
        find_pictures(path)
    elif path.is_file() and path.suffix in STATISTICS_ENDINGS:
        read_statistics(path)
    else:
        raise ValueError(
            f"`real` must be a folder of pictures, or statistics of them ({', '.join(STATISTICS_ENDINGS)}); got "
            f"{shorten(str(path))}, which is {'another file' if path.is_file() else 'not there'}."
        )


def measure(
    drawn: list[Path], real: Path, extractor: nn.Module, out: Path, batch_size: int = 64, num_workers: int = 0
) -> dict[str, Any]:
    r"""
    The Frechet distance between drawn and real pictures.

    Args:
        drawn (`list[Path]`): Drawn pictures, all of one square size.
        real (`Path`): Folder of real pictures, or statistics of them.
        extractor (`torch_fidelity.FeatureExtractorBase`): With one kind of features.
        out (`Path`): Folder to leave real.npz in, the statistics of real pictures.
        batch_size (`int`, *optional*, defaults to 64): Pictures per pass of the extractor.
        num_workers (`int`, *optional*, defaults to 0): Processes that read pictures.

    Returns:
        `dict`: `"fid"`, `"num_real"` (None if the statistics do not say) and `"resolution"`.

    Raises:
        ValueError: If a picture cannot be read, or the statistics are of other features.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    size = read_rgb_image(drawn[0]).width
    about = {"extractor": extractor.get_name(), "features": extractor.get_requested_features_list()[0], "size": size}
    if real.is_dir():
        files = find_pictures(real)
        theirs = statistics_of(SquarePictures(files, size), extractor, batch_size, num_workers)
        about["num_pictures"] = len(files)
        buffer = io.BytesIO()
        np.savez(buffer, mu=theirs["mu"], sigma=theirs["sigma"], about=json.dumps(about))
        write_whole(out / "real.npz", buffer.getvalue())
    else:
        theirs = read_statistics(real)
        said = theirs["about"] or about
        if changed := [name for name in about if said.get(name) != about[name]]:
            raise ValueError(
                f"expected statistics of the same features in {shorten(str(real))}: {changed[0]} must be "
                f"{about[changed[0]]}; got {said.get(changed[0])}. Name the folder of pictures to make them anew."
            )
        about["num_pictures"] = (theirs["about"] or {}).get("num_pictures")
    ours = statistics_of(SquarePictures(drawn, size), extractor, batch_size, num_workers)
    if ours["mu"].shape != theirs["mu"].shape:
        raise ValueError(
            f"expected statistics of {len(ours['mu'])} features, those of {about['extractor']}, in "
            f"{shorten(str(real))}; got {len(theirs['mu'])}. Name the folder of pictures to make them anew."
        )
    distance = fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID]
    return {
        "fid": distance,
        "num_real": about["num_pictures"],
        "resolution": {
            "drawn": size,
            "real": f"shorter edge scaled to {size} by Pillow's antialiased bicubic filter, the middle cut out"
            if real.is_dir()
            else "as in the statistics",
        },
    }


# ------------------------------------------------------------------------------------------------------------ command


def main(
    drawing: DrawingOptions,
    captions: Path,
    real: Path,
    num_prompts: int,
    caption_seed: int,
    inception_weights: Path | None,
    extractor_name: str | None,
    feature_batch_size: int,
    num_workers: int,
) -> None:
    r"""
    Draws captions, measures the distance to real pictures, and prints and writes the result.

    Args:
        drawing (`DrawingOptions`): How to draw.
        captions (`Path`): COCO's captions_val2014.json, or one like it.
        real (`Path`): Folder of real pictures, or statistics of them.
        num_prompts (`int`): Captions to draw.
        caption_seed (`int`): Of the choice of captions.
        inception_weights (`Path`, *optional*): Local file, .pth or .safetensors.
        extractor_name (`str`, *optional*): module:Class of another feature extractor.
        feature_batch_size (`int`): Pictures per pass of the extractor.
        num_workers (`int`): Processes that read pictures.

    Raises:
        ValueError: If captions, pictures, weights or extractor are not what they should be.
    """
    # What is wrong with the measuring should show before hours of drawing.
    chosen = choose_captions(read_captions(captions), num_prompts, caption_seed)
    _check_real(real)
    processes = Processes.from_environment()
    extractor = open_extractor(extractor_name, inception_weights, torch.device("cpu"))

    command = drawing.command(
        "evaluate",
        "fid",
        captions=captions,
        real=real,
        num_prompts=num_prompts,
        caption_seed=caption_seed,
        inception_weights=inception_weights,
        extractor=extractor_name,
        feature_batch_size=feature_batch_size,
        num_workers=num_workers,
    )
    prompts = {f"pictures/{i:06d}.png": row["caption"] for i, row in enumerate(chosen)}
    sha256 = draw_with(drawing, prompts, processes, command)
    processes.leave()
    if not processes.is_first:
        return
    rows = [{"file": name, **row} for name, row in zip(prompts, chosen, strict=True)]
    write_lines(drawing.out / "captions.jsonl", rows)
    extractor.to(processes.device)
    drawn = [drawing.out / name for name in prompts]
    measured = measure(drawn, real, extractor, drawing.out, feature_batch_size, num_workers)
    is_fid_30k = num_prompts == NUM_PROMPTS and extractor_name is None
    result = {
        "metric": "FID-30K" if is_fid_30k else f"Frechet distance of {num_prompts} pictures, not FID-30K",
        "is_fid_30k": is_fid_30k,
        **measured,
        "num_prompts": num_prompts,
        "num_pictures_captioned": len({row["image_id"] for row in chosen}),
        "extractor": extractor.get_name(),
        "features": extractor.get_requested_features_list()[0],
        "inception_sha256": None if extractor_name else hashlib.sha256(inception_weights.read_bytes()).hexdigest(),
        "model_sha256": sha256,
        "options": {
            "caption_seed": caption_seed,
            **{name: getattr(drawing, name) for name in ("seed", "batch_size", "dtype", *OPTIONS)},
        },
        "versions": {
            "mmar": __version__,
            "torch": torch.__version__,
            "torch_fidelity": torch_fidelity().__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
        },
        "command": command,
    }
    write_json(drawing.out / "result.json", result)
    print(json.dumps(result, indent=1))
    if not is_fid_30k:
        print(
            f"This is not FID-30K, and cannot be compared with it: {num_prompts} pictures by "
            f"{extractor.get_name()}, where FID-30K is of {NUM_PROMPTS} by {INCEPTION}.",
            file=sys.stderr,
        )

"""
Measures the mean and std of a VAE's latents on one's pictures, and writes shift and scale to its config.

    mmar latent-scale runs/kl16 PICTURES

PICTURES is a folder, a parquet file (or a folder of them) with a column of pictures, or the id of a data set of
`datasets`. Pictures come in random order and are read until the standard errors are below the tolerance and at least
64 were read, or to their end; the report says which. The folder is that of an `AutoencoderKL` or of an MMAR; in both
the scale stands in the VAE's config, and nowhere else.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import tqdm

from ..files import path_inside, write_whole
from ..modeling_mmar.configuration_mmar import shorten, shorten_names
from ..modeling_mmar.modeling_mmar import MMARAutoencoderKL
from ..modeling_mmar.saving_mmar import fetch_part, open_weights, weights_files
from ..processors.image_processing_mmar import FORMATS, MMARImageProcessor, read_image_file
from .folders import read_config
from .latent_moments import MIN_PICTURES, LatentMoments
from .models import model_class_of


# Of a streamed data set, from which the next picture is drawn.
SHUFFLE_BUFFER = 1000
# A posterior's std is clamped to 3e-7; less spread than this is none.
MIN_STD = 1.0e-6


def iterate_pictures(
    source: str, column: str = "image", split: str = "train", seed: int = 0
) -> Iterator[Image.Image | bytes | str]:
    r"""
    Pictures of a folder, of parquet files or of a data set, in random order.

    Args:
        source (`str`): Folder, parquet file, or id of a data set.
        column (`str`, *optional*, defaults to `"image"`): Where the pictures are in parquet and data sets.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set.
        seed (`int`, *optional*, defaults to 0): Of the order.

    Yields:
        Paths, bytes or PIL pictures, not yet decoded where they are files; None for a path that leads out of the
        source's folder, which rows of others must not name.

    Raises:
        ValueError: If there are no pictures.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in picture_suffixes())
        if files:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
            yield from (path_inside(files[i], [path]) for i in order.tolist())
            return
        if not (parquets := sorted(path.rglob("*.parquet"))):
            raise ValueError(
                f"expected pictures or parquet files in {shorten(source)}; there are none. Name another folder."
            )
        files = [str(file) for file in parquets]
        dataset = _load_dataset("parquet", source, column, data_files={split: files}, split=split)
    elif path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"expected a parquet file; there is none at {shorten(source)}. Check the path.")
        dataset = _load_dataset("parquet", source, column, data_files={split: source}, split=split)
    else:
        dataset = _load_dataset(source, source, column, split=split)
    for row in dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
        picture = row[column]
        picture = (picture["bytes"] or picture["path"]) if isinstance(picture, dict) else picture
        if isinstance(picture, str):
            try:
                picture = read_image_file(picture, places=False)  # base64
            except ValueError:
                folder = path if path.is_dir() else path.parent
                picture = path_inside(folder / picture, [folder]) if path.exists() else None
        yield picture


def picture_suffixes() -> set[str]:
    """Endings of the picture files that are opened."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _load_dataset(name: str, source: str, column: str, **kwargs: Any) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(name, streaming=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a folder, a parquet file or the id of a data set; {shorten(source)} cannot be opened "
            f"({shorten(error)})."
        ) from error
    # Of some formats the columns are known only once a row was read.
    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    if column not in features:
        raise ValueError(
            f"{shorten(source)} must have a column {shorten(column)}; it has {shorten_names(features)}. Name it with "
            "--column."
        )
    if isinstance(features[column], datasets.Image):
        # Decoded below, where a broken picture is counted and not fatal.
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def load_vae(folder: Path) -> tuple[AutoencoderKL, dict[str, Any]]:
    r"""
    Loads the VAE of a folder, without the rest of an MMAR.

    Args:
        folder (`Path`): Of a diffusers `AutoencoderKL`, or of an MMAR with one, in it or by reference.

    Returns:
        The VAE, and the folder's config as it stands in the file.

    Raises:
        ValueError: If the folder is neither.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the folder of a VAE or of an MMAR; {shorten(str(folder))} has no readable config.json "
            f"({shorten(error)})."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"expected names and values in {shorten(str(folder / 'config.json'))}; got {shorten(config)}."
        )
    # diffusers' own name, or that which earlier MMARs wrote.
    if config.get("_class_name") in (AutoencoderKL.__name__, MMARAutoencoderKL.__name__):
        for file in weights_files("vae", folder):
            open_weights(file)  # names what is broken
        try:
            return AutoencoderKL.from_pretrained(folder).eval(), config
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected an AutoencoderKL in {shorten(str(folder))}; its config and weights do not agree "
                f"({shorten(error)}). Copy or convert it again."
            ) from error
    if not _is_of_mmar(config) or not issubclass(model_class_of(read_config(folder)).vae_class, AutoencoderKL):
        kind = config.get("_class_name") or config.get("model_type")
        raise ValueError(
            f"expected the folder of an AutoencoderKL or of an MMAR with one; {shorten(str(folder))} is of a "
            f"{shorten(kind)}."
        )
    of_model = read_config(folder)
    vae = AutoencoderKL(**of_model.vae_config)
    if of_model.frozen_weights == "reference" and "vae" in of_model.frozen_parts:
        files, prefix = fetch_part("vae", of_model.frozen_parts["vae"]), ""
    else:
        files, prefix = weights_files("model", folder), "vae."
    state = {}
    for name in files:
        with open_weights(name) as file:
            state |= {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"expected the weights of the VAE that `vae_config` describes in {shorten(str(folder))}; they do not fit "
            f"({shorten(error)}). Copy the folder again."
        ) from error
    return vae.eval(), config


@torch.no_grad()
def measure(
    vae: AutoencoderKL,
    pictures: Iterator[Any],
    image_size: int,
    tolerance: float = 0.005,
    max_pictures: int | None = None,
    batch_size: int = 16,
) -> tuple[LatentMoments, int]:
    r"""
    Measures the moments of a VAE's latents until they have converged or the pictures end.

    Args:
        vae (`AutoencoderKL`): In eval mode; its device does the work.
        pictures (iterator): Paths, bytes or PIL pictures; see `iterate_pictures`.
        image_size (`int`): Pixels along each side, after resizing and cropping.
        tolerance (`float`, *optional*, defaults to 0.005): Largest standard error, in units of the std.
        max_pictures (`int`, *optional*): Stop here at the latest.
        batch_size (`int`, *optional*, defaults to 16): Pictures per pass.

    Returns:
        `LatentMoments`, and how many pictures could not be read.

    Raises:
        ValueError: If no picture could be read, the latents are NaN, infinite or all the same, or the VAE cannot take
            pictures of that size.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size < factor or image_size % factor:
        raise ValueError(f"`image_size` must be a multiple of {factor}, the VAE's factor; got {image_size}.")
    processor = MMARImageProcessor(size={"height": image_size, "width": image_size})
    moments, broken, batch = LatentMoments(vae.config.latent_channels), 0, []

    def encode() -> None:
        if batch:
            pixel_values = torch.cat(batch).to(vae.device, vae.dtype)
            posterior = vae.encode(pixel_values).latent_dist
            moments.update(posterior.mean, posterior.std)
            batch.clear()

    with tqdm(total=max_pictures, unit=" pictures", desc="measuring") as bar:
        for picture in pictures:
            try:
                batch.append(processor(processor.fetch_images([picture]), return_tensors="pt")["pixel_values"])
            except (ValueError, OSError):
                broken += 1
                continue
            bar.update()
            if len(batch) == batch_size:
                encode()
                bar.set_postfix(error=f"{float(moments.errors().max()):.4f}", broken=broken)
                if moments.converged(tolerance):
                    break
            if max_pictures is not None and moments.num_pictures + len(batch) >= max_pictures:
                break
    encode()
    if not moments.num_pictures:
        raise ValueError(f"expected pictures to measure on; none could be read, {broken} were broken.")
    if not bool(torch.isfinite(moments.std).all()) or not bool((moments.std > MIN_STD).all()):
        raise ValueError(
            f"expected latents that vary; got the stds {shorten(moments.std[:-1].tolist())}. Check the VAE and the "
            "pictures."
        )
    return moments, broken


def _is_of_mmar(config: dict[str, Any]) -> bool:
    """Whether a config is that of an MMAR, or of a model that builds on it."""
    return str(config.get("model_type")).startswith("mmar")


def has_scale(vae: AutoencoderKL) -> bool:
    """Whether a VAE's config holds another scale than none; the default of diffusers may have been trained with."""
    config = vae.config
    return config.scaling_factor != 1.0 or bool(config.shift_factor) or config.latents_std is not None


def write_scale(folder: Path, config: dict[str, Any], moments: LatentMoments, mode: str) -> dict[str, Any]:
    r"""
    Writes the measured scale to a folder's config, in whole or not at all.

    Args:
        folder (`Path`): Of the VAE or MMAR.
        config (`dict`): Its config, as `load_vae` gives it.
        moments (`LatentMoments`): What was measured.
        mode (`str`): `"scalar"` for one shift and scale, `"channel"` for one per channel.

    Returns:
        `dict`: The four entries as written.
    """
    entries: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    if mode == "scalar":
        entries |= {"scaling_factor": 1 / float(moments.std[-1]), "shift_factor": float(moments.mean[-1])}
    else:
        entries |= {"latents_mean": moments.mean[:-1].tolist(), "latents_std": moments.std[:-1].tolist()}
    of_vae = config["vae_config"] if _is_of_mmar(config) else config
    changed = {**of_vae, **entries}
    changed = {**config, "vae_config": changed} if _is_of_mmar(config) else changed
    write_whole(folder / "config.json", f"{json.dumps(changed, indent=2, sort_keys=True)}\n".encode())
    return entries


def measure_folder(
    folder: Path,
    images: str,
    mode: str,
    tolerance: float,
    max_pictures: int | None,
    image_size: int | None,
    column: str,
    split: str,
    batch_size: int,
    seed: int,
    overwrite: bool,
    dry_run: bool,
) -> dict[str, Any]:
    r"""
    Measures the latents of a folder's VAE and writes their scale to its config. A warning on stderr says what kept the
    measurement from converging.

    Args:
        folder (`Path`): Of an `AutoencoderKL` or an MMAR; its config.json is changed.
        images (`str`): Folder, parquet file, or id of a data set.
        mode (`str`): As for `write_scale`.
        tolerance, max_pictures, batch_size (*optional*): As for `measure`.
        image_size (`int`, *optional*): Pixels along each side; the config's by default.
        column, split, seed (*optional*): Of the images; as for `iterate_pictures`.
        overwrite (`bool`): Replace a scale that was measured before.
        dry_run (`bool`): Measure, and write nothing.

    Returns:
        `dict`: What was measured, and under `"written"` the entries of the config.

    Raises:
        ValueError: If there is a scale already and it must not be replaced, or as `load_vae` and `measure` raise.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be above 0; got {tolerance}.")
    vae, config = load_vae(folder)
    if not (overwrite or dry_run) and has_scale(vae):
        raise ValueError(
            f"`overwrite` must be set for {shorten(str(folder))}, which has a scale already; a model trained with it "
            "would be lost. Pass --overwrite to replace it."
        )
    if torch.accelerator.is_available():
        vae.to(torch.accelerator.current_accelerator())
    image_size = image_size if image_size is not None else config.get("image_size", vae.config.sample_size)
    pictures = iterate_pictures(images, column, split, seed)
    moments, broken = measure(vae, pictures, image_size, tolerance, max_pictures, batch_size)
    report = {
        "pictures": moments.num_pictures,
        "broken": broken,
        "converged": moments.converged(tolerance),
        "standard_error": float(moments.errors().max()),
        "mean": moments.mean[:-1].tolist(),
        "std": moments.std[:-1].tolist(),
        "mean_of_all": float(moments.mean[-1]),
        "std_of_all": float(moments.std[-1]),
    }
    if not report["converged"]:
        if moments.num_pictures < MIN_PICTURES:
            reason = f"{moments.num_pictures} pictures were read, and fewer than {MIN_PICTURES} are not relied on"
        else:
            reason = (
                f"the standard error is {report['standard_error']:.3g} after {moments.num_pictures} pictures, not "
                f"below the tolerance of {tolerance}"
            )
        was_stopped = max_pictures is not None and moments.num_pictures >= max_pictures
        print(
            f"warning: {reason}; {'raise --max_pictures' if was_stopped else 'give more pictures'}"
            f"{', or a larger --tolerance' if moments.num_pictures >= MIN_PICTURES else ''}.",
            file=sys.stderr,
        )
    if not dry_run:
        report["written"] = write_scale(folder, config, moments, mode)
    return report

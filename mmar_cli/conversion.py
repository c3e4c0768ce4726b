"""`mmar convert`, `latent-scale`, `export`, `card` and `peft`: others' checkpoints to MMAR's, MMAR's to the Hub."""

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from .app import app, command, command_group


Checkpoint = Annotated[Path, Argument(metavar="CHECKPOINT", help=".ckpt, .pt, .pth or .safetensors")]
Out = Annotated[Path, Argument(metavar="OUT", help="folder to make")]
NoEma = Annotated[bool, Option("--no-ema", help="not the average of the weights, where there is one")]
Sha256 = Annotated[str | None, Option(help="the file's expected hash")]
Mmar = Annotated[str, Argument(metavar="MODEL", help="folder or repository of an MMAR")]

convert = command_group("convert", "Convert the parts of an MMAR, and make an untrained MMAR of them.")
peft = command_group("peft", "Export and import an MMAR's PLoRA as an adapter in peft's format.")


@command(convert)
def kl16(checkpoint: Checkpoint, out: Out, no_ema: NoEma = False, sha256: Sha256 = None) -> None:
    """
    Convert a KL autoencoder, LDM's kl-f16 or MAR's KL-16, to a folder of diffusers' AutoencoderKL.

    The latent scale is not in such files: `mmar latent-scale` measures it.
    """
    from mmar.conversion.convert_kl16 import convert_kl16

    print(json.dumps(convert_kl16(checkpoint, out, not no_ema, sha256), indent=2))


@command(convert)
def vq16(checkpoint: Checkpoint, out: Out, no_ema: NoEma = False, sha256: Sha256 = None) -> None:
    """Convert a VQ autoencoder, LDM's vq-f16, to a folder of diffusers' VQModel, for the ablation with VQ."""
    from mmar.conversion.convert_vq16 import convert_vq16

    print(json.dumps(convert_vq16(checkpoint, out, not no_ema, sha256), indent=2))


@command(convert)
def qwen2(
    backbone: Annotated[str, Option(help="folder or repository of a Qwen2 or Qwen2.5")],
    vae: Annotated[str, Option(help="folder of an AutoencoderKL with its measured scale")],
    preset: Annotated[str, Option(help="mmar-0.5b, mmar-7b, or a folder with a config.json")],
    out: Annotated[Path, Option(help="folder to make")],
    revision: Annotated[str | None, Option(help="of the backbone's repository")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Option(help="of all but the VAE")] = "auto",
    frozen: Annotated[
        Literal["include", "reference"], Option(help="whether the folder has the backbone and the VAE")
    ] = "include",
    max_shard_size: Annotated[str, Option(help="largest weights file")] = "5GB",
    seed: Annotated[int, Option(help="of the new weights")] = 0,
    token: Annotated[str | None, Option(help="for a repository that is not public")] = None,
    allow_unmeasured_scale: Annotated[
        bool, Option("--allow-unmeasured-scale", help="take a VAE whose latent scale was never measured")
    ] = False,
    image_token: Annotated[
        str | None, Option(help="a token that the tokenizer reserves, such as <|image_pad|>, in place of a new one")
    ] = None,
    add_rows: Annotated[
        bool, Option("--add-rows", help="give the embedding a row for the image token, where none is free")
    ] = False,
) -> None:
    """Make the folder of an untrained MMAR of a Qwen2 and a VAE."""
    from mmar.conversion.init_from_qwen2 import init_from_qwen2

    report = init_from_qwen2(
        backbone,
        vae,
        preset,
        out,
        revision,
        dtype,
        frozen,
        max_shard_size,
        seed,
        token,
        allow_unmeasured_scale,
        image_token,
        add_rows,
    )
    print(json.dumps(report, indent=2))


@command(app)
def latent_scale(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="of an AutoencoderKL or an MMAR; its config.json is changed")
    ],
    images: Annotated[str, Argument(metavar="IMAGES", help="folder, parquet file, or id of a data set")],
    mode: Annotated[
        Literal["scalar", "channel"], Option(help="one scale for all channels, or one for each")
    ] = "scalar",
    tolerance: Annotated[float, Option(help="largest standard error, in units of the standard deviation")] = 0.005,
    max_pictures: Annotated[int | None, Option(min=1, help="stop at the latest after so many images")] = None,
    image_size: Annotated[int | None, Option(help="pixels along each side; the config's by default")] = None,
    column: Annotated[str, Option(help="of the images, in parquet files and data sets")] = "image",
    split: Annotated[str, Option(help="of a data set")] = "train",
    batch_size: Annotated[int, Option(min=1, help="images per pass of the VAE")] = 16,
    seed: Annotated[int, Option(help="of the order")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="replace a scale that was measured before")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="measure, and write nothing")] = False,
) -> None:
    """Measure the mean and standard deviation of a VAE's latents, and write shift and scale to its config."""
    from mmar.conversion.measure_latent_scale import measure_folder

    report = measure_folder(
        folder,
        images,
        mode,
        tolerance,
        max_pictures,
        image_size,
        column,
        split,
        batch_size,
        seed,
        overwrite,
        dry_run,
    )
    print(json.dumps(report, indent=2))


@command(app)
def export(
    source: Annotated[str, Argument(metavar="SOURCE", help="folder or repository of a trained model, such as final")],
    out: Out,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option(help="of all but the VAE, which stays float32")
    ] = "bfloat16",
    guidance_scale: Annotated[float | None, Option(help="new default of image generation")] = None,
    num_ar_steps: Annotated[int | None, Option(help="new default of image generation")] = None,
    num_inference_steps: Annotated[int | None, Option(help="new default of image generation")] = None,
) -> None:
    """Write an MMAR again as one folder that opens through every door, as it goes to the Hub."""
    from mmar.conversion.export import main

    main(source, out, dtype, guidance_scale, num_ar_steps, num_inference_steps)


@command(app)
def card(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="of an MMAR; its README.md is replaced")],
    facts: Annotated[Path | None, Option(help="YAML of what the author states")] = None,
    evaluation: Annotated[list[Path], Option(help="an evaluation's result.json; may be given several times")] = [],  # noqa: B006
    repo_id: Annotated[str | None, Option(help="repository that the examples open; the folder by default")] = None,
) -> None:
    """Write the model card of an MMAR from its config and weights, stated facts and evaluations' results."""
    from mmar.conversion.model_card import main

    main(folder, facts, evaluation, repo_id)


@command(peft, "export")
def export_adapter(model: Mmar, adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder to make")]) -> None:
    """Write an MMAR's PLoRA as an adapter."""
    from mmar.conversion.models import open_model
    from mmar.conversion.plora_peft import export_plora

    export_plora(open_model(model), adapter)


@command(peft, "import")
def import_adapter(
    model: Mmar,
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder of the adapter")],
    out: Annotated[Path, Argument(metavar="OUT", help="folder of the new MMAR")],
) -> None:
    """Write an MMAR with an adapter in place of its PLoRA."""
    from mmar.conversion.folders import new_folder
    from mmar.conversion.models import open_pipeline
    from mmar.conversion.plora_peft import import_plora

    pipe = open_pipeline(model, dtype="auto", device="cpu")
    import_plora(pipe.model, adapter)
    with new_folder(out) as unfinished:
        pipe.save_pretrained(unfinished)

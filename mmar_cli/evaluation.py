"""`mmar evaluate` and `mmar memory`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from .app import app, command, command_group
from .generation import Dtype, GuidanceScale, NumArSteps, NumInferenceSteps, Preset


# As in evaluation/fid.py, which says why.
NUM_PROMPTS = 30_000

Model = Annotated[str, Argument(metavar="MODEL", help="folder or Hub id of an MMAR")]
Out = Annotated[Path, Option(help="folder to draw into, or to go on with")]
Seed = Annotated[int, Option(help="of the run")]
BatchSize = Annotated[int, Option(min=1, help="images generated at once")]

evaluate = command_group("evaluate", "Measure an MMAR on benchmarks of the field.")
geneval = command_group("geneval", "GenEval: draw its prompts, and sum up what its scorer found.", evaluate)


@command(evaluate)
def fid(
    model: Model,
    captions: Annotated[Path, Option(help="COCO's captions_val2014.json, or one like it")],
    real: Annotated[Path, Option(help="folder of real images, or statistics of them")],
    out: Out,
    num_prompts: Annotated[int, Option(help="captions to draw")] = NUM_PROMPTS,
    caption_seed: Annotated[int, Option(help="of the choice of captions")] = 0,
    inception_weights: Annotated[Path | None, Option(help="local file, .pth or .safetensors")] = None,
    extractor: Annotated[str | None, Option(help="module:Class of another feature extractor")] = None,
    feature_batch_size: Annotated[int, Option(min=1, help="images per pass of the extractor")] = 64,
    num_workers: Annotated[int, Option(min=0, help="processes that read images")] = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    preset: Preset = None,
    num_ar_steps: NumArSteps = None,
    num_inference_steps: NumInferenceSteps = None,
) -> None:
    """FID-30K: generate images of captions and compare their features with those of real images."""
    from mmar.evaluation.drawing import DrawingOptions
    from mmar.evaluation.fid import main

    drawing = DrawingOptions(
        model, out, seed, batch_size, dtype, guidance_scale, preset, num_ar_steps, num_inference_steps
    )
    main(
        drawing,
        captions,
        real,
        num_prompts,
        caption_seed,
        inception_weights,
        extractor,
        feature_batch_size,
        num_workers,
    )


@command(geneval, "draw")
def draw_geneval(
    model: Model,
    metadata: Annotated[Path, Option(help="GenEval's evaluation_metadata.jsonl")],
    out: Out,
    num_prompts: Annotated[int | None, Option(help="so many, spread over the file; all by default")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    preset: Preset = None,
    num_ar_steps: NumArSteps = None,
    num_inference_steps: NumInferenceSteps = None,
) -> None:
    """Generate four images of each prompt, in the layout that GenEval's scorer reads."""
    from mmar.evaluation.drawing import DrawingOptions
    from mmar.evaluation.geneval import draw

    drawing = DrawingOptions(
        model, out, seed, batch_size, dtype, guidance_scale, preset, num_ar_steps, num_inference_steps
    )
    draw(drawing, metadata, num_prompts)


@command(geneval)
def scores(
    results: Annotated[Path, Argument(metavar="RESULTS", help="what evaluate_images.py wrote")],
    out: Annotated[Path | None, Option(help="file for the scores as JSON")] = None,
) -> None:
    """Sum up the scorer's results."""
    from mmar.evaluation.geneval import print_scores

    print_scores(results, out)


@command(evaluate)
def dpg(
    model: Model,
    prompts: Annotated[Path, Option(help="folder of ID.txt, dpg_bench/prompts")],
    out: Out,
    num_prompts: Annotated[int | None, Option(help="so many, spread over the folder; all by default")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    preset: Preset = None,
    num_ar_steps: NumArSteps = None,
    num_inference_steps: NumInferenceSteps = None,
) -> None:
    """DPG-Bench: generate images of its prompts, in the grids that its scorer reads."""
    from mmar.evaluation.dpg import main
    from mmar.evaluation.drawing import DrawingOptions

    drawing = DrawingOptions(
        model, out, seed, batch_size, dtype, guidance_scale, preset, num_ar_steps, num_inference_steps
    )
    main(drawing, prompts, num_prompts)


@command(evaluate)
def vlmevalkit(
    model: Model,
    data: Annotated[list[str], Option(help="benchmark: a name, or a table (NAME.tsv); may be given several times")],
    work_dir: Annotated[Path, Option(help="folder for answers and scores")],
    name: Annotated[
        str | None, Option(help="the model's name in file names; the last part of MODEL by default")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="so many rows of each benchmark; all by default")] = None,
    batch_size: Annotated[int, Option(help="chats answered at once")] = 8,
    dtype: Annotated[
        str | None, Option(help="of the weights, such as bfloat16; float32 on a CPU by default, as saved elsewhere")
    ] = None,
    device: Annotated[str | None, Option(help="where the model runs; the accelerator if there is one")] = None,
    max_new_tokens: Annotated[int | None, Option(help="most tokens of an answer; the model's by default")] = None,
    judge: Annotated[str, Option(help="the kit's judge for open answers; none by default")] = "exact_matching",
) -> None:
    """Answer benchmarks of VLMEvalKit, and have the kit score the answers. Started again, it goes on."""
    from mmar.evaluation.vlmevalkit_adapter import main

    main(model, data, work_dir, name, limit, batch_size, dtype, device, max_new_tokens, judge)


@command(evaluate)
def ave(
    results: Annotated[
        Path, Argument(metavar="RESULTS", help="folder of VLMEvalKit's result files, or a JSON file of scores")
    ],
) -> None:
    """AVE@18: the mean that the paper reports, of one model's scores on 18 benchmarks."""
    from mmar.evaluation.ave import main

    main(results)


@command(app)
def memory(
    presets: Annotated[
        list[str],
        Argument(metavar="PRESET...", help="mmar-0.5b, mmar-7b, mmar-tiny, or folders with a config.json"),
    ],
    batch_size: Annotated[int, Option(min=1, help="rows, images or questions at a time")] = 1,
    text_length: Annotated[int, Option(min=1, help="tokens of text next to the image's")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option(help="of the weights and activations")
    ] = "bfloat16",
) -> None:
    """Show the memory that inference and training of an MMAR need, from its config alone."""
    from mmar.evaluation.memory import main

    main(presets, batch_size, text_length, dtype)

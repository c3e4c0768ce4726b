"""
DPG-Bench (arXiv 2403.05135): pictures of its prompts in the layout that its scorer reads.

    mmar evaluate dpg MODEL --prompts dpg_bench/prompts --out runs/dpg
    torchrun --nproc_per_node 8 -m mmar evaluate dpg MODEL ...
    bash dpg_bench/dist_eval.sh runs/dpg/grids 256                 # DPG-Bench's own, on GPUs

The prompt in 7.txt becomes grids/7.png, four pictures in two rows; each alone is in samples/7/. The scorer is told the
edge of one of them, 256 for a model of 256 x 256 pictures, and cuts the grid up. A run that was stopped is started
again with the same words and goes on where it was.
"""

import io
from pathlib import Path

from PIL import Image

from ..files import write_whole
from ..modeling_mmar.configuration_mmar import shorten
from ..processors.image_processing_mmar import read_rgb_image
from .drawing import DrawingOptions, Processes, draw_with, spread


# A grid's rows and columns; the scorer knows no other.
GRID = 2


def read_prompts(folder: Path) -> list[tuple[str, str]]:
    r"""
    Args:
        folder (`Path`): One text file per prompt, ID.txt.

    Returns:
        `list[tuple[str, str]]`: IDs and prompts, by ID.

    Raises:
        ValueError: If the folder is missing or has no such file, a file is empty or no text, or an ID has a dot, at
            which the scorer would cut it off.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder of prompts, ID.txt each; there is no folder {shorten(str(folder))}.")
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"expected a folder of prompts, ID.txt each; there is no .txt in {shorten(str(folder))}.")
    prompts = []
    for file in files:
        try:
            prompt = " ".join(file.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"expected a prompt in UTF-8 in {shorten(str(file))}; got {shorten(error)}.") from error
        if not prompt:
            raise ValueError(f"expected a prompt in {shorten(str(file))}; it is empty. Fill or remove it.")
        if "." in file.stem:
            raise ValueError(
                "expected file names with one dot, before txt, since DPG-Bench's scorer cuts them at the first; got "
                f"{shorten(file.name)}. Rename it."
            )
        prompts.append((file.stem, prompt))
    return prompts


def make_grid(files: list[Path]) -> Image.Image:
    r"""
    Args:
        files (`list[Path]`): Four square pictures of one size.

    Returns:
        `PIL.Image.Image`: Two rows of two, the first above.
    """
    pictures = [read_rgb_image(file) for file in files]
    size = pictures[0].width
    grid = Image.new("RGB", (GRID * size, GRID * size))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, GRID)
        grid.paste(picture, (column * size, row * size))
    return grid


def main(drawing: DrawingOptions, prompts: Path, num_prompts: int | None) -> None:
    r"""
    Draws the prompts of DPG-Bench, and makes their grids.

    Args:
        drawing (`DrawingOptions`): How.
        prompts (`Path`): Folder of ID.txt, dpg_bench/prompts.
        num_prompts (`int`, *optional*): So many, spread over the folder; all by default.

    Raises:
        ValueError: As `read_prompts`, `spread` and `draw_pictures` raise.
    """
    rows = [row for _, row in spread(read_prompts(prompts), num_prompts, "num_prompts")]
    processes = Processes.from_environment()
    samples = {name: [f"samples/{name}/{sample}.png" for sample in range(GRID * GRID)] for name, _ in rows}
    captions = {file: prompt for name, prompt in rows for file in samples[name]}
    command = drawing.command("evaluate", "dpg", prompts=prompts, num_prompts=num_prompts)
    draw_with(drawing, captions, processes, command)
    processes.leave()
    if not processes.is_first:
        return
    size = 0
    for name, files in samples.items():
        grid = make_grid([drawing.out / file for file in files])
        size, buffer = grid.width // GRID, io.BytesIO()
        grid.save(buffer, "PNG")
        write_whole(drawing.out / "grids" / f"{name}.png", buffer.getvalue())
    print(f"{drawing.out / 'grids'}: {len(rows)} grids. Next: dist_eval.sh of DPG-Bench, with that folder and {size}.")

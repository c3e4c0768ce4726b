"""
Makes glyphs.png: one row of luminance and opacity per kind, from the SVG files of Microsoft's Fluent Emoji (flat).

It is kept so that the glyphs can be made again; nobody needs to run it. The SVG files come with the npm package
`fluentui-emoji` 1.3.0 and are rendered to PNG files of 256 pixels by `@resvg/resvg-js`:

    python examples/scenes/make_glyphs.py FOLDER_OF_PNG_FILES
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from examples.scenes.world import GLYPH_SIZE, GLYPHS_FILE, KINDS


# Kinds whose file has another name.
FILE_NAMES = {
    "apple": "red-apple",
    "boat": "sailboat",
    "car": "automobile",
    "gift": "wrapped-gift",
    "hat": "top-hat",
    "heart": "red-heart",
    "lamp": "light-bulb",
    "leaf": "maple-leaf",
    "lock": "locked",
    "moon": "crescent-moon",
    "plane": "airplane",
    "shirt": "t-shirt",
    "tree": "evergreen-tree",
}
# Below this spread of luminance a glyph counts as of one shade.
SMALLEST_SPREAD = 0.08


def normalized_luminance(luminance: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Luminance stretched to [0, 1], with a mean of 0.5 over the glyph, so that every tint shows its shading."""
    inside = luminance[opacity > 0.5]
    low, high = np.percentile(inside, (4, 96))
    if high - low < SMALLEST_SPREAD:
        return np.full_like(luminance, 0.5)
    stretched = np.clip((luminance - low) / (high - low), 0, 1)
    exponents = np.linspace(0.25, 4, 76)
    means = [(stretched[opacity > 0.5] ** exponent).mean() for exponent in exponents]
    return stretched ** exponents[int(np.abs(np.array(means) - 0.5).argmin())]


def make_glyph(path: Path) -> np.ndarray:
    """A glyph of `GLYPH_SIZE` pixels, `(GLYPH_SIZE, GLYPH_SIZE, 2)`: luminance and opacity, 8 bits each."""
    picture = Image.open(path).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda value: 255 * (value > 40)).getbbox())
    scale = GLYPH_SIZE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # "RGBa" has colours times opacity, so that transparent pixels do not darken the edge.
    resized = np.asarray(picture.convert("RGBa").resize((width, height), Image.LANCZOS), dtype=np.float64) / 255
    opacity = resized[..., 3]
    colors = np.clip(resized[..., :3] / np.maximum(opacity[..., None], 1e-3), 0, 1)
    luminance = normalized_luminance(colors @ [0.299, 0.587, 0.114], opacity)
    glyph = np.zeros((GLYPH_SIZE, GLYPH_SIZE, 2), dtype=np.uint8)
    top, left = (GLYPH_SIZE - height) // 2, (GLYPH_SIZE - width) // 2
    glyph[top : top + height, left : left + width, 0] = np.rint(luminance * 255)
    glyph[top : top + height, left : left + width, 1] = np.rint(opacity * 255)
    return glyph


def main() -> None:
    folder = Path(sys.argv[1])
    glyphs = [make_glyph(folder / f"{FILE_NAMES.get(kind, kind)}.png") for kind in KINDS]
    Image.fromarray(np.concatenate(glyphs), mode="LA").save(GLYPHS_FILE, optimize=True)


if __name__ == "__main__":
    main()

"""Image processor of MMAR: any picture to `pixel_values` in [-1, 1], and back. Needs neither torchvision nor a GPU."""

import base64
import io
import itertools
import math
import numbers
import os
import string
import threading
from collections.abc import Callable
from typing import Any, TypedDict
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.utils import get_session
from PIL import ExifTags, Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict

from .configuration_mmar import shorten, shorten_names


AUTO_MAP = {"AutoImageProcessor": "image_processing_mmar.MMARImageProcessor"}
DEFAULT_SIZE = {"height": 256, "width": 256}
# Largest 16-bit value over largest 8-bit value: 65535 / 255.
UINT16_PER_UINT8 = 257
# Of the range [-1, 1]; the model, its VAE and `postprocess` expect it.
RESCALE_FACTOR = 1 / 255
MEAN = STD = [0.5, 0.5, 0.5]
# Written by `to_dict` and by processors of transformers.
SAVED_NAMES = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class")
# Of transformers' loaders.
LOADING_NAMES = ("backend", "code_revision", "config", "trust_remote_code", "use_fast")
# Rounding in half precision; anything further outside [0, 1] is a mistake of range.
FLOAT_RANGE_TOLERANCE = 1e-3
OUTPUT_TYPES = ("pil", "np", "pt")

# The one reader of encoded images: which forms an image may have, which formats are opened, how much is read.

# Formats that are opened. PIL knows more, among them EPS, for which it starts Ghostscript. MPO is PIL's name for the
# JPEG files of some cameras and phones.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What one encoded image may hold. The pixels are PIL's default limit against decompression bombs, which other code of
# the process may have changed.
MAX_IMAGE_BYTES = 2**27
MAX_IMAGE_PIXELS = 178_956_970
# Seconds that a server may be silent, and seconds until the image must be there.
URL_TIMEOUT = 10.0
URL_TOTAL_TIMEOUT = 30.0
URL_SCHEMES = ("http://", "https://")
# What undoes each EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where PIL keeps the metadata that an orientation may stand in.
METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# Of both alphabets, padding and line breaks.
BASE64_CHARACTERS = (string.ascii_letters + string.digits + "+/-_=" + string.whitespace).encode()


DEFAULTS = {
    "size": DEFAULT_SIZE,
    "resample": int(Image.Resampling.BICUBIC),
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": RESCALE_FACTOR,
    "image_mean": MEAN,
    "image_std": STD,
}


class MMARImageProcessorKwargs(TypedDict, total=False):
    """Arguments of `MMARImageProcessor` that may also be given per call."""

    size: int | list[int] | tuple[int, ...] | dict[str, int] | None
    resample: int | None
    do_convert_rgb: bool | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    rescale_factor: float | None
    image_mean: float | list[float] | None
    image_std: float | list[float] | None


def read_image(source: Any, places: bool = True) -> Any:
    r"""
    Reads one image, with bounds on its bytes, its pixels and the time that a server may take.

    Args:
        source: The image itself: a PIL image; a numpy array or torch tensor; the content of a file as `bytes`; a file
            object that is open in binary mode; `{"bytes": ..., "path": ...}`, as `datasets` stores images; base64, in
            either alphabet, with or without padding and line breaks; a data URI. Or the place where it is: a path, a
            `file://` URI or an http(s) URL.
        places (`bool`, *optional*, defaults to `True`): Whether a place may be named. A caller may; a row of data or
            a request of somebody else could name any file that this process may read.

    Returns:
        Arrays and tensors as they are; anything else as an upright `PIL.Image.Image` in the file's own mode.

    Raises:
        ValueError: If it is none of these, or missing, empty, broken, truncated, too large, or of none of `FORMATS`.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image")
    content, name = _content(source, places)
    if not set(FORMATS) <= Image.OPEN.keys():
        Image.init()
    # A build of PIL may lack some; MPO comes with JPEG.
    formats = [known for known in FORMATS if known in Image.OPEN]
    return _decode(lambda: Image.open(io.BytesIO(content), formats=formats), name)


def read_image_file(source: Any, places: bool = True) -> bytes:
    r"""
    Reads the file of an image without decoding it, with the same bounds.

    Args:
        source: An encoded image or the place where it is, as `read_image` takes them.
        places (`bool`, *optional*, defaults to `True`): Whether a place may be named.

    Returns:
        `bytes`: The content of the file, whatever it is.

    Raises:
        ValueError: If it is none of these, or missing or too large.
    """
    return _content(source, places)[0]


def read_rgb_image(source: Any, places: bool = True) -> Image.Image:
    r"""
    Reads one image as the model sees it, at its own size.

    Args:
        source: An image or the place where it is, as `read_image` takes them.
        places (`bool`, *optional*, defaults to `True`): Whether a place may be named.

    Returns:
        `PIL.Image.Image`: Upright, RGB, transparency over white.

    Raises:
        ValueError: If it cannot be read; see `read_image` and `MMARImageProcessor`.
    """
    image = read_image(source, places)
    if isinstance(image, Image.Image) and image.mode == "RGB" and not image.has_transparency_data:
        return image
    # To and fro without loss.
    reader = MMARImageProcessor(do_resize=False, do_center_crop=False)
    return reader.postprocess(reader(image)["pixel_values"])[0]


def _decode(opened: Image.Image | Callable[[], Image.Image], name: str) -> Image.Image:
    """An upright image of what PIL has opened or is to open."""
    try:
        image = opened if isinstance(opened, Image.Image) else opened()
        # Tiles are what is left to be decoded.
        if getattr(image, "tile", None) and image.format not in FORMATS:
            raise ValueError(f"its format is {image.format}")
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"it has {image.width} x {image.height} pixels.")
        # Decodes everything, so that a truncated file raises here instead of giving a grey half.
        image.load()
        return _upright(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"An image must have at most {MAX_IMAGE_PIXELS} pixels, the limit against decompression bombs; {name} has "
            f"more: {shorten(error)} Shrink it first."
        ) from error
    # Decoders raise whatever they meet (OSError, SyntaxError, struct.error, zlib.error, MemoryError).
    except Exception as error:
        raise ValueError(
            f"An image must be a file of {', '.join(FORMATS)}; {name} is empty, broken, truncated or of another "
            f"format: {shorten(error)}. Replace the file."
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says; metadata that cannot be read turns nothing."""
    # Of the copy, which parses the metadata anew: the file's own object may keep what was read before a parser failed.
    turned = image.copy()
    try:
        method = UPRIGHT.get(turned.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # parsers of metadata raise whatever they meet
        method = None
    turned = turned if method is None else turned.transpose(method)
    for key in METADATA:
        turned.info.pop(key, None)
    return turned


def _content(source: Any, places: bool) -> tuple[bytes, str]:
    """The content of a file, and what to call it in errors."""
    content, name = _any_content(source, places)
    if len(content) > MAX_IMAGE_BYTES:
        raise _too_large(name)
    return content, name


def _any_content(source: Any, places: bool) -> tuple[bytes, str]:
    """The content of a file, at most a byte longer than it may be, and what to call it in errors."""
    if isinstance(source, dict) and source.get("bytes") is not None:
        source = source["bytes"]
        if isinstance(source, str):
            return _from_text(source)
    elif isinstance(source, dict) and isinstance(source.get("path"), (str, os.PathLike)):
        source = source["path"]

    if isinstance(source, (bytes, bytearray, memoryview)):
        content, name = bytes(source), f"{len(source)} bytes"
        # What `base64.b64encode` returns are bytes too; no file of `FORMATS` consists of such characters alone.
        try:
            return _from_base64(content, name) if _is_base64(content) else (content, name)
        except ValueError:
            return content, name
    if hasattr(source, "read"):
        return _from_file_object(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            "An image must be a PIL image, a numpy array, a torch tensor, bytes, a file object, a dict with `bytes` "
            f"or `path`, base64, a data URI, a path or a URL; got {type(source).__name__}."
        )
    if places and not _is_data_uri(source):
        return _from_place(source)
    return _from_text(source)


def _is_data_uri(source: Any) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _from_text(source: str | os.PathLike) -> tuple[bytes, str]:
    """A data URI or base64, where no place may be named."""
    name = shorten(os.fspath(source))
    if _is_data_uri(source):
        return _from_data_uri(source, name)
    try:
        if isinstance(source, str):
            return _from_base64(source, name)
    except ValueError:
        pass
    raise ValueError(
        "An image must be here itself, as bytes, base64 or a data URI, where somebody else than the caller names it; "
        f"got {name}. Read the file first."
    )


def _from_place(source: str | os.PathLike) -> tuple[bytes, str]:
    """The content of a path or URL, or of a base64 string, which a short one may look like."""
    text, name = os.fspath(source), shorten(os.fspath(source))
    if isinstance(source, str) and text.lower().startswith(URL_SCHEMES):
        return _download(text, name), name
    if isinstance(source, str) and text.lower().startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"A file:// URI must name a file of this machine; got {name}. Drop {shorten(parts.netloc)}."
            )
        text = url2pathname(parts.path)
        if not os.path.isfile(text):
            raise ValueError(f"An image must be a file; {name} is not there. Check that the file exists.")
    if os.path.isfile(text):
        try:
            with open(text, "rb") as file:
                return file.read(MAX_IMAGE_BYTES + 1), name
        except OSError as error:
            raise ValueError(f"An image must be a file that can be read; {name} is not: {shorten(error)}.") from error
    if os.path.isdir(text):
        raise ValueError(f"An image must be a file; {name} is a folder. Pass the files in it one by one.")
    try:
        if isinstance(source, str):
            return _from_base64(text, f"{name} (read as base64, because no such file exists)")
    except ValueError as error:
        reason = error
    else:
        reason = None
    raise ValueError(
        "An image must be the path of a file, a file:// URI, an http(s) URL, a data URI or a base64 string; got "
        f"{name}, which is none of these. Check that the file exists."
    ) from reason


def _from_data_uri(source: str, name: str) -> tuple[bytes, str]:
    """The content in a data URI, in base64 or percent-encoded."""
    head, comma, data = source.partition(",")
    if not comma:
        raise ValueError(f"A data URI must have its data after a comma; got {name}.")
    if len(data) > 3 * MAX_IMAGE_BYTES:
        raise _too_large(name)
    content = unquote_to_bytes(data)
    is_base64 = head.lower().rstrip().endswith(";base64") or _is_base64(content)
    return _from_base64(content, name) if is_base64 else (content, name)


def _is_base64(content: bytes) -> bool:
    return not content[:64].translate(None, BASE64_CHARACTERS) and not content.translate(None, BASE64_CHARACTERS)


def _from_base64(text: str | bytes, name: str) -> tuple[bytes, str]:
    """The content in base64 of either alphabet, with or without padding and white space."""
    if len(text) > 2 * MAX_IMAGE_BYTES:
        raise _too_large(name)
    text = text.encode(errors="replace") if isinstance(text, str) else text
    compact = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True), name
    except ValueError as error:
        raise ValueError(f"An image in base64 must be valid; {name} is not: {shorten(error)}.") from error


def _from_file_object(source: Any) -> tuple[bytes, str]:
    """The content of a file object, from its beginning if it can be sought."""
    name = f"the file object {shorten(getattr(source, 'name', type(source).__name__))}"
    try:
        if source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek"):
            source.seek(0)
        content = source.read(MAX_IMAGE_BYTES + 1)
    except Exception as error:  # of whatever is behind it
        raise ValueError(f"An image must be readable; {name} is not: {shorten(error)}.") from error
    if not isinstance(content, bytes):
        raise ValueError(
            f"A file object must give bytes; {name} gives {type(content).__name__}. Open it in binary mode."
        )
    return content, name


def _download(url: str, name: str) -> bytes:
    """The content at a URL, at most a byte longer than it may be."""
    content, failure, is_late = bytearray(), [], threading.Event()

    def fetch() -> None:
        try:
            # Not compressed: what a few bytes may unpack to has no bound.
            headers = {"Accept-Encoding": "identity"}
            with get_session().stream(
                "GET", url, timeout=URL_TIMEOUT, follow_redirects=True, headers=headers
            ) as response:
                response.raise_for_status()
                for chunk in response.iter_raw():
                    content.extend(chunk[: MAX_IMAGE_BYTES + 1 - len(content)])
                    if is_late.is_set() or len(content) > MAX_IMAGE_BYTES:
                        return
        # Refused, timed out, no such page, offline mode: the client's own classes moved between its versions.
        except Exception as error:
            failure.append(error)

    # In a thread, as the client bounds each wait for bytes and not their sum.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(URL_TOTAL_TIMEOUT)
    if thread.is_alive():
        is_late.set()
        raise ValueError(
            f"An image must be at its URL within {URL_TOTAL_TIMEOUT:g} seconds; {name} is not. Download it first."
        )
    if failure:
        raise ValueError(
            f"An image must be at its URL; the request of {name} failed: {shorten(failure[0])}."
        ) from failure[0]
    return bytes(content)


def _too_large(name: str) -> ValueError:
    return ValueError(f"An image must have at most {MAX_IMAGE_BYTES} bytes; {name} has more. Shrink it first.")


# Pixels


def _over_white(image: Image.Image) -> np.ndarray:
    """Composites a PIL image with transparency over white."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _num_entries(images: Any) -> int:
    """How many there are in (nested) lists."""
    return sum(map(_num_entries, images)) if isinstance(images, (list, tuple)) else 1


def _pil_to_rgb_array(image: Image.Image) -> np.ndarray:
    """
    Any PIL mode to `(H, W, 3)`, uint8, or float32 in [0, 1] for mode F. Values of mode I up to 255 and of mode F up to
    255 but beyond 1 are levels of 8 bits, as `Image.convert` makes and reads them.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if values.min() >= 0 and 1 + FLOAT_RANGE_TOLERANCE < values.max() <= 255:
            values = values / np.float32(255)
        return _array_to_rgb_array(values, channels_first=False)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise ValueError(
                f"A picture of PIL mode {shorten(image.mode)} must hold 16-bit values in [0, 65535]; got values in "
                f"[{values.min()}, {values.max()}]. Scale it first."
            )
        is_byte = image.mode == "I" and values.max() <= np.iinfo(np.uint8).max
        array = _array_to_rgb_array(values.astype(np.uint8 if is_byte else np.uint16), channels_first=False)
        # PIL composites no image of these modes; the value that is transparent is one of them.
        array[values == image.info.get("transparency", -1)] = 255
        return array
    if image.has_transparency_data:
        return _over_white(image)
    return np.asarray(image.convert("RGB"))


def _array_to_rgb_array(array: np.ndarray, channels_first: bool) -> np.ndarray:
    """Array of shape `(H, W)`, `(H, W, C)` or `(C, H, W)` to `(H, W, 3)`, uint8, or float32 in [0, 1]."""
    if array.ndim == 2:
        array = array[..., None]
    elif channels_first:
        array = np.moveaxis(array, 0, -1)

    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array / UINT16_PER_UINT8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() > 255:
            raise ValueError(
                f"An integer picture must hold values in [0, 255] (uint16: [0, 65535]); got {array.dtype} with values "
                f"in [{array.min()}, {array.max()}]. Convert it to uint8 or uint16."
            )
        array = array.astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("A float picture must hold finite values; got NaN or infinity. Check what made it.")
        low, high = array.min(), array.max()
        if low < -FLOAT_RANGE_TOLERANCE or high > 1 + FLOAT_RANGE_TOLERANCE:
            hint = "(x + 1) / 2" if low >= -1 and high <= 1 else "x / 255"
            raise ValueError(
                f"A float picture must hold values in [0, 1]; got [{low:g}, {high:g}]. Convert it, perhaps by {hint}."
            )
        array = array.clip(0, 1)
    else:
        raise ValueError(f"A picture must be an array of integers or floats; got dtype {array.dtype}.")

    if array.shape[-1] == 1:
        return array.repeat(3, axis=-1)
    if array.shape[-1] == 4:
        if array.dtype == np.uint8:
            return _over_white(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
        alpha = array[..., 3:]
        return array[..., :3] * alpha + (1 - alpha)
    return array


class MMARImageProcessor(BaseImageProcessor):
    r"""
    Turns pictures into `pixel_values` of shape `(B, 3, H, W)`, float32 in [-1, 1], and back.

    Accepted, one or in (nested) lists: PIL images of every mode; numpy arrays and torch tensors `(H, W)`, `(H, W, C)`,
    `(C, H, W)` or a batch of them with C in 1, 3, 4; file contents as `bytes`; file objects; `{"bytes", "path"}`;
    base64; data URIs; paths; `file://` URIs; http(s) URLs (see `read_image`). Integers are in [0, 255] (uint16 and
    PIL's 16-bit modes: [0, 65535], divided by 257; PIL's mode I: either, by its largest value), floats in [0, 1]
    (PIL's mode F: [0, 255] too). Where both the first and the last axis could be channels, numpy is read as
    `(H, W, C)` and torch as `(C, H, W)`, unless `input_data_format` is given. Transparency is composited over white;
    EXIF rotation is applied.

    Geometry, any aspect ratio: with `do_resize` and `do_center_crop` (the default) the picture is scaled, aspect ratio
    kept, until it just covers `size`, and what hangs over on the longer side is cut off equally at both ends. With
    `do_resize` alone it is stretched to `size`. With `do_center_crop` alone the middle is cut out unscaled. A picture
    of exactly `size` passes through untouched: `x / 127.5 - 1`.

    Args:
        size (`dict[str, int]` or `int`, *optional*, defaults to `{"height": 256, "width": 256}`): Output in pixels.
        resample (`int`, *optional*, defaults to 3): PIL's filter, antialiased; 3 is bicubic, 1 is Lanczos.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Convert to RGB; if `False`, only RGB is accepted.
        do_resize (`bool`, *optional*, defaults to `True`): Scale to `size`.
        do_center_crop (`bool`, *optional*, defaults to `True`): Keep the aspect ratio and cut to `size`.
        do_rescale (`bool`, *optional*, defaults to `True`): Map [0, 255] to [0, 1]. Floats are in [0, 1] already.
        do_normalize (`bool`, *optional*, defaults to `True`): Subtract `image_mean` and divide by `image_std`: [0, 1]
            becomes [-1, 1].
        rescale_factor (`float`, *optional*, defaults to 1 / 255): What values in [0, 255] are multiplied by. Floats in
            [0, 1] count as a 255th of them.
        image_mean (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`): Of the channels.
        image_std (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`): Of the channels. MMAR is
            trained with the defaults of these three.

    Raises:
        ValueError: If `size` is not a height and a width of at least 1, a factor, mean or deviation is not a finite
            number, or an argument is unknown.

    Example:

    ```python
    >>> processor = MMARImageProcessor(size=64)
    >>> processor(Image.new("RGBA", (100, 80)), return_tensors="pt").pixel_values.shape
    torch.Size([1, 3, 64, 64])
    ```
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = MMARImageProcessorKwargs

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        resample: int | None = None,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = None,
        do_center_crop: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        rescale_factor: float | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        **kwargs,
    ):
        saved = {name: kwargs.pop(name) for name in SAVED_NAMES if name in kwargs}
        super().__init__(processor_class=saved.get("processor_class"))
        if type(size) is bool:
            raise ValueError("`size` must be a height and width in pixels; got a bool.")
        given = {
            "size": size,
            "resample": resample,
            "do_convert_rgb": do_convert_rgb,
            "do_resize": do_resize,
            "do_center_crop": do_center_crop,
            "do_rescale": do_rescale,
            "do_normalize": do_normalize,
            "rescale_factor": rescale_factor,
            "image_mean": image_mean,
            "image_std": image_std,
            **kwargs,
        }
        for name, value in self._checked_options(given, DEFAULTS).items():
            setattr(self, name, value)

    @classmethod
    def _checked_options(cls, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the class in one form, with defaults in place of None."""
        # `None` means "not given", as everywhere in transformers.
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(set(given) - set(DEFAULTS)):
            raise ValueError(
                f"MMARImageProcessor must be given arguments that it knows, {', '.join(DEFAULTS)}; got "
                f"{shorten_names(unknown)}. Drop them."
            )
        options = {**defaults, **given}
        options["size"] = cls._checked_size(options["size"])
        if not isinstance(options["resample"], int):
            raise ValueError(f"`resample` must be one of PIL's filters; got {shorten(options['resample'])}.")
        options["resample"] = int(options["resample"])
        for name in ("image_mean", "image_std"):
            values = options[name]
            values = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values] * len(MEAN)
            options[name] = [cls._checked_number(value, name) for value in values]
            if len(values) != len(MEAN):
                raise ValueError(f"`{name}` must be a number, or one per channel, {len(MEAN)}; got {shorten(values)}.")
        options["rescale_factor"] = cls._checked_number(options["rescale_factor"], "rescale_factor")
        if 0 in (*options["image_std"], options["rescale_factor"]):
            raise ValueError(
                "`image_std` and `rescale_factor` must not be 0; got 0. Leave out what is not to be done."
            )
        return options

    @staticmethod
    def _checked_number(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number; got {shorten(value)}.")
        return float(value)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs) -> Any:
        """As transformers', but an argument that is neither the class's nor the loader's own is refused."""
        own = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_") or name in LOADING_NAMES}
        if not kwargs.get("return_unused_kwargs"):
            cls._checked_options(kwargs, DEFAULTS)
        return super().from_dict(image_processor_dict, **kwargs, **own)

    @staticmethod
    def _checked_size(size: Any) -> dict[str, int]:
        """`size` as a dict of height and width."""
        size = dict(get_size_dict(size))
        if set(size) != {"height", "width"} or min(size.values()) < 1:
            raise ValueError(
                f'`size` must be {{"height": int, "width": int}} with values of at least 1, or one int; got '
                f"{shorten(size)}."
            )
        return size

    def to_dict(self) -> dict[str, Any]:
        """Configuration as a dictionary, with the `auto_map` that lets transformers find this class on the Hub."""
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    def fetch_images(self, images: Any, places: bool = True) -> Any:
        r"""
        Opens whatever is encoded or a place; PIL images, arrays and tensors pass unchanged.

        Args:
            images: One image or (nested) lists of images.
            places (`bool`, *optional*, defaults to `True`): Whether paths and URLs are followed; see `read_image`.

        Returns:
            The same nesting, with upright `PIL.Image.Image`s in the file's own mode.

        Raises:
            ValueError: If an image cannot be read; see `read_image`.
        """
        numbers, total = itertools.count(), _num_entries(images)

        def fetch(entry: Any) -> Any:
            if isinstance(entry, (list, tuple)):
                return [fetch(own) for own in entry]
            number = next(numbers)
            if entry is None or isinstance(entry, (Image.Image, np.ndarray, torch.Tensor)):
                return entry
            try:
                return read_image(entry, places)
            except ValueError as error:
                if entry is images:
                    raise
                raise ValueError(f"Picture {number} of {total}: {shorten(error)}") from error

        return fetch(images)

    def flatten_images(self, images: Any) -> list[Any]:
        r"""
        Flattens (nested) lists and batched arrays into a list of single pictures, in order. None alone is none.

        Args:
            images: One picture or (nested) lists of pictures.

        Returns:
            `list`: Single pictures.
        """
        if images is None:
            return []
        if isinstance(images, (list, tuple)):
            # A None among pictures stays, and is refused later: dropping it would shift those after it.
            return [image for entry in images for image in ([None] if entry is None else self.flatten_images(entry))]
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            return list(images)
        return [images]

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        data_format: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Turns pictures into `pixel_values`; calling the processor does the same.

        Args:
            images: One picture or (nested) lists of pictures; see the class for what a picture may be.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; numpy arrays if not given.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays and tensors.
            device (`str` or `torch.device`, *optional*): Where the result goes, with `return_tensors="pt"`.
            data_format (`str`, *optional*, defaults to `"channels_first"`): Of the result; `"channels_last"` gives
                `(B, H, W, 3)`, which the model does not take.
            **kwargs: Any argument of the class, for this call only.

        Returns:
            `BatchFeature` with `pixel_values` of shape `(B, 3, H, W)`, float32 in [-1, 1], B counting all pictures of
            all lists in order. Without resizing and cropping, and with `return_tensors=None`, pictures of several
            sizes come as a list.

        Raises:
            ValueError: If there is no picture, or one is missing, empty, broken, truncated, too large, of a wrong
                number of channels, or holds NaN or values outside its range.
        """
        options = self._checked_options(kwargs, {name: getattr(self, name) for name in DEFAULTS})
        for name, value in (("input_data_format", input_data_format), ("data_format", data_format)):
            if value not in (None, "channels_first", "channels_last"):
                raise ValueError(f"`{name}` must be 'channels_first' or 'channels_last'; got {shorten(value)}.")
        if device is not None and return_tensors != "pt":
            raise ValueError(f"`device` must go with return_tensors='pt'; got {shorten(return_tensors)}. Add it.")

        pictures = self.flatten_images(images)
        if not pictures:
            raise ValueError("Expected at least one picture; got none.")
        arrays = []
        for index, picture in enumerate(pictures):
            try:
                array = self._to_rgb_array(self.fetch_images(picture), input_data_format, options["do_convert_rgb"])
                array = self._resize_and_crop(array, options)
                arrays.append(self._to_range(array, options))
            except ValueError as error:
                raise ValueError(f"Picture {index} of {len(pictures)}: {shorten(error)}") from error

        if data_format == "channels_last":
            arrays = [np.moveaxis(array, 0, -1) for array in arrays]
        if len({array.shape for array in arrays}) > 1:
            if return_tensors is not None:
                place = slice(2) if data_format == "channels_last" else slice(1, 3)
                sizes = sorted({array.shape[place] for array in arrays})
                raise ValueError(
                    f"Pictures of one batch must have one size; got (height, width) {sizes}. "
                    "Leave `do_resize` on, or pass them one by one."
                )
            return BatchFeature({"pixel_values": arrays})
        features = BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)
        return features if device is None else features.to(device)

    def _to_rgb_array(self, picture: Any, input_data_format: str | None, do_convert_rgb: bool) -> np.ndarray:
        """One picture to `(H, W, 3)`, uint8, or float32 in [0, 1]."""
        if isinstance(picture, Image.Image):
            if 0 in picture.size:
                raise ValueError(f"it must have pixels; got width x height {picture.size[0]} x {picture.size[1]}.")
            if not do_convert_rgb and picture.mode != "RGB":
                raise ValueError(
                    f"with `do_convert_rgb=False` it must be RGB; got mode {shorten(picture.mode)}. Set "
                    "`do_convert_rgb=True` or convert it."
                )
            return _pil_to_rgb_array(read_image(picture))

        is_tensor = isinstance(picture, torch.Tensor)
        if is_tensor:
            picture = picture.detach().cpu()
            picture = (picture.float() if picture.is_floating_point() else picture).numpy()
        if not isinstance(picture, np.ndarray):
            raise ValueError(f"it must be an image; got {type(picture).__name__}.")
        shape = tuple(picture.shape)
        if picture.ndim not in (2, 3) or 0 in shape:
            raise ValueError(f"an array must be (H, W), (H, W, C) or (C, H, W), none of them 0; got shape {shape}.")
        channel_counts = (1, 3, 4) if do_convert_rgb else (3,)
        channels_first = False
        if picture.ndim == 3:
            first, last = shape[0] in channel_counts, shape[-1] in channel_counts
            channels_first = first and (is_tensor or not last)
            if input_data_format is not None:
                channels_first = input_data_format == "channels_first"
        if shape[0 if channels_first else -1] not in channel_counts and (picture.ndim == 3 or not do_convert_rgb):
            raise ValueError(
                f"an array must have {' or '.join(map(str, channel_counts))} channels on its first or last axis"
                f"{'' if do_convert_rgb else ' with `do_convert_rgb=False`'}; got shape {shape}."
            )
        if picture.ndim == 2 and not do_convert_rgb:
            raise ValueError(f"with `do_convert_rgb=False` an array must have 3 channels; got shape {shape}.")
        return _array_to_rgb_array(picture, channels_first)

    def _resize_and_crop(self, array: np.ndarray, options: dict[str, Any]) -> np.ndarray:
        """Brings `(H, W, 3)` to `size` as the class states."""
        height, width = array.shape[:2]
        new_height, new_width = options["size"]["height"], options["size"]["width"]
        if (height, width) == (new_height, new_width) or not (options["do_resize"] or options["do_center_crop"]):
            return array
        if not options["do_resize"]:
            if height < new_height or width < new_width:
                raise ValueError(
                    f"it must be at least `size` ({new_height} x {new_width}) to be cut without `do_resize`; got "
                    f"{height} x {width}."
                )
            top, left = (height - new_height) // 2, (width - new_width) // 2
            return array[top : top + new_height, left : left + new_width]
        # Crop box in source pixels: the same as resizing and then cropping, without the intermediate picture, which
        # would be huge for extreme aspect ratios.
        box_height, box_width = float(height), float(width)
        if options["do_center_crop"]:
            scale = max(new_height / height, new_width / width)
            box_height, box_width = min(height, new_height / scale), min(width, new_width / scale)
        top, left = (height - box_height) / 2, (width - box_width) / 2
        box = (left, top, min(width, left + box_width), min(height, top + box_height))

        def resize(image: Image.Image) -> np.ndarray:
            return np.asarray(image.resize((new_width, new_height), options["resample"], box=box))

        if array.dtype == np.uint8:
            return resize(Image.fromarray(np.ascontiguousarray(array)))
        channels = [resize(Image.fromarray(np.ascontiguousarray(array[..., c]))) for c in range(3)]
        return np.stack(channels, axis=-1).clip(0, 1)  # bicubic and Lanczos overshoot

    def _to_range(self, array: np.ndarray, options: dict[str, Any]) -> np.ndarray:
        """`(H, W, 3)` to `(3, H, W)`, float32, in the range that the options ask for."""
        is_integer = array.dtype == np.uint8
        do_rescale, do_normalize, factor = options["do_rescale"], options["do_normalize"], options["rescale_factor"]
        is_standard = options["image_mean"] == MEAN and options["image_std"] == STD
        array = np.moveaxis(array, -1, 0).astype(np.float32)
        if is_integer and do_normalize and not do_rescale:
            raise ValueError("`do_normalize` expects values in [0, 1]; set `do_rescale=True` for integer pictures.")
        if is_integer and do_normalize and is_standard and factor == RESCALE_FACTOR:
            return array / np.float32(127.5) - 1
        if do_rescale and factor != RESCALE_FACTOR:
            array = array * np.float32(factor if is_integer else 255 * factor)
        elif do_rescale and is_integer:
            array = array / np.float32(255)
        if not do_normalize:
            return array
        if is_standard:
            return 2 * array - 1
        mean, std = (np.float32(options[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        return (array - mean) / std

    def postprocess(
        self, pixel_values: torch.Tensor | np.ndarray | list[torch.Tensor], output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        r"""
        Turns model output back into pictures; values outside [-1, 1] are clipped.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1].
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            `"pil"`: list of B RGB `PIL.Image.Image`s. `"np"`: `np.ndarray` of shape `(B, H, W, 3)`, float32 in
            [0, 1]. `"pt"`: `torch.FloatTensor` of shape `(B, 3, H, W)` in [0, 1], on the input's device.

        Raises:
            ValueError: If `pixel_values` has another shape, or NaN or infinite values, which would come out black, or
                if `output_type` is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}; got {shorten(output_type)}.")
        if isinstance(pixel_values, (list, tuple)) and pixel_values:
            pixel_values = torch.stack([torch.as_tensor(picture) for picture in pixel_values])
        pixel_values = torch.as_tensor(pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` must have shape (B, 3, H, W); got {tuple(pixel_values.shape)}.")
        pixel_values = pixel_values.detach().float()
        if not torch.isfinite(pixel_values).all():
            raise ValueError(
                "`pixel_values` must be finite; got NaN or infinite values, which would give a black picture. Check "
                "the latents, the dtype (float16 overflows in many VAEs) and `guidance_scale`."
            )
        pixel_values = (pixel_values / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixel_values
        arrays = pixel_values.permute(0, 2, 3, 1).cpu().numpy()  # (B, 3, H, W) -> (B, H, W, 3)
        if output_type == "np":
            return arrays
        return [Image.fromarray(array) for array in np.rint(arrays * 255).astype(np.uint8)]


__all__ = ["MMARImageProcessor", "read_image", "read_image_file", "read_rgb_image"]

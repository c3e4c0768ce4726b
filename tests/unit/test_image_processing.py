"""MMARImageProcessor: what comes in, in which range it goes out, what is refused."""

import base64
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mmar.processors.image_processing_mmar import MMARImageProcessor


RED = (255, 0, 0)


@pytest.fixture
def processor():
    return MMARImageProcessor(size=64)


@pytest.fixture
def picture():
    """64 x 64 of random bytes, and the pixel values that it must become."""
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    return Image.fromarray(array), array, expected


def pixels(processor, images, **kwargs):
    return processor(images, return_tensors="pt", **kwargs).pixel_values


def file_bytes(image, file_format="PNG", **kwargs):
    buffer = BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


# What comes in


def test_picture_of_the_right_size_passes_exactly(processor, picture):
    image, array, expected = picture
    values = pixels(processor, image)
    assert values.dtype == torch.float32
    assert values.shape == (1, 3, 64, 64)
    assert torch.equal(values, expected)


def test_arrays_tensors_and_batches_agree(processor, picture):
    _, array, expected = picture
    chw = np.moveaxis(array, -1, 0)
    for given in (
        array,
        chw,
        torch.from_numpy(array),
        torch.from_numpy(chw.copy()),
        array[None],
        array.astype(np.int64),
    ):
        assert torch.equal(pixels(processor, given), expected)
    # Floats hold x / 255, so that 2 (x / 255) - 1 differs from x / 127.5 - 1 by rounding only.
    for given in (array / 255, (array / 255).astype(np.float32), torch.from_numpy(chw / 255)):
        torch.testing.assert_close(pixels(processor, given), expected, rtol=0, atol=2e-7)


def test_integers_are_never_taken_for_floats(processor):
    # An almost black picture holds only 0 and 1, which is no reason to read it as [0, 1].
    assert torch.equal(pixels(processor, np.ones((64, 64, 3), np.uint8)), torch.full((1, 3, 64, 64), 1 / 127.5 - 1))


def test_ambiguous_channel_axis(processor):
    array = np.zeros((3, 5, 3), np.uint8)
    array[0] = 255
    kwargs = {"do_resize": False, "do_center_crop": False}
    # numpy: (H, W, C), the first row is white; torch: (C, H, W), the first channel is full.
    assert pixels(processor, array, **kwargs).shape == (1, 3, 3, 5)
    assert torch.equal(pixels(processor, array, **kwargs)[0, :, 0], torch.ones(3, 5))
    assert torch.equal(pixels(processor, torch.from_numpy(array), **kwargs)[0, 0], torch.ones(5, 3))
    first = pixels(processor, array, input_data_format="channels_first", **kwargs)
    assert torch.equal(first, pixels(processor, torch.from_numpy(array), **kwargs))


def test_nested_lists_keep_their_order(processor):
    greys = [Image.new("L", (64, 64), value) for value in (0, 51, 102, 255)]
    values = pixels(processor, [[greys[0]], [], [greys[1], greys[2]], greys[3]])
    torch.testing.assert_close(values[:, 0, 0, 0], torch.tensor([-1.0, -0.6, -0.2, 1.0]))


def test_without_return_tensors_numpy_comes(processor, picture):
    values = processor(picture[0])["pixel_values"]
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float32
    assert values.shape == (1, 3, 64, 64)


def test_paths_bytes_and_base64(processor, picture, tmp_path):
    image, _, expected = picture
    content = file_bytes(image)
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    for source in (path, str(path), content, encoded, f"data:image/png;base64,{encoded}"):
        assert torch.equal(pixels(processor, source), expected)


def test_url(processor, picture, monkeypatch):
    # Its server is on this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    image, _, expected = picture
    content = file_bytes(image)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/picture.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(pixels(processor, f"{address}/picture.png"), expected)
        with pytest.raises(ValueError, match="404"):
            processor(f"{address}/missing.png")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        # Half transparent red over white: 255, and 255 - 128 = 127 (alpha 128 of 255).
        (Image.new("RGBA", (64, 64), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (64, 64), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (64, 64), (40, 255)), (40, 40, 40)),
        (Image.new("L", (64, 64), 77), (77, 77, 77)),
        (Image.new("1", (64, 64), 1), (255, 255, 255)),
        (Image.new("CMYK", (64, 64), (0, 255, 255, 0)), RED),
        (Image.new("P", (64, 64), 0), (0, 0, 0)),
        (Image.fromarray(np.full((64, 64), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((64, 64), 257 * 80, np.uint16)), (80, 80, 80)),
        (Image.fromarray(np.full((64, 64), 257 * 80, np.int32)), (80, 80, 80)),
        # As `convert` makes them of 8 bits, and reads them.
        (Image.new("L", (64, 64), 200).convert("I"), (200, 200, 200)),
        (Image.new("RGB", (64, 64), (200, 200, 200)).convert("F"), (200, 200, 200)),
        (Image.fromarray(np.full((64, 64), 0.8, np.float32)), (204, 204, 204)),
        (Image.fromarray(np.full((64, 64), 257 * 80, ">u2")), (80, 80, 80)),
        # An image is as dark as it is: these are 16 bits for sure.
        (Image.fromarray(np.full((64, 64), 200, np.uint16)), (1, 1, 1)),
        (Image.new("YCbCr", (64, 64), (76, 85, 255)), (254, 0, 0)),
        (Image.new("HSV", (64, 64), (0, 255, 255)), RED),
        (Image.new("RGBX", (64, 64), RED), RED),
        (Image.new("RGBa", (64, 64), (128, 0, 0, 128)), (255, 127, 127)),
        (Image.new("La", (64, 64), (0, 0)), (255, 255, 255)),
        (Image.new("P", (64, 64), 0).convert("PA"), (0, 0, 0)),
        (np.full((64, 64, 3), 257 * 80, np.uint16), (80, 80, 80)),
        (np.full((64, 64), 77, np.uint8), (77, 77, 77)),
        (np.full((64, 64, 1), 77, np.uint8), (77, 77, 77)),
        (np.full((64, 64), True), (255, 255, 255)),
        (np.full((64, 64, 4), (255, 0, 0, 128), np.uint8), (255, 127, 127)),
        (np.full((4, 64, 64), 0.0, np.float32), (255, 255, 255)),
    ],
)
def test_modes(processor, image, expected):
    values = pixels(processor, image)
    expected = torch.tensor(expected, dtype=torch.float32)[:, None, None] / 127.5 - 1
    assert torch.equal(values[0], expected.expand(3, 64, 64))


def test_transparency_in_files(processor, tmp_path):
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "transparent.png", transparency=1)
    palette.save(tmp_path / "transparent.gif", transparency=1)
    Image.fromarray(np.full((64, 64), 257 * 80, np.uint16)).save(tmp_path / "deep_key.png", transparency=257 * 80)
    Image.new("L", (64, 64), 80).save(tmp_path / "grey_key.png", transparency=80)
    Image.new("1", (64, 64), 0).save(tmp_path / "bit_key.png", transparency=0)
    Image.new("RGB", (64, 64), RED).save(tmp_path / "key.png", transparency=RED)
    Image.fromarray(np.full((64, 64), 257 * 80, np.uint16)).save(tmp_path / "deep.png")
    assert pixels(processor, tmp_path / "opaque.png")[0, :, 0, 0].tolist() == [1, -1, -1]
    for name in ("transparent.png", "transparent.gif", "key.png", "deep_key.png", "grey_key.png", "bit_key.png"):
        assert torch.equal(pixels(processor, tmp_path / name), torch.ones(1, 3, 64, 64)), name
    assert pixels(processor, tmp_path / "deep.png").unique() == torch.tensor(80.0) / 127.5 - 1


def test_exif_rotation(processor, picture):
    image, array, _ = picture
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright after 90 degrees clockwise
    source = file_bytes(image, exif=exif)
    upright = pixels(processor, np.rot90(array, k=-1).copy())
    assert torch.equal(pixels(processor, source), upright)
    assert torch.equal(pixels(processor, Image.open(BytesIO(source))), upright)


# Geometry


def test_resize_and_crop_keeps_the_aspect_ratio(processor):
    # A wide picture in thirds, red white red; its middle square is white.
    array = np.full((100, 300, 3), 255, np.uint8)
    array[:, :100, 1:] = array[:, 200:, 1:] = 0
    values = pixels(processor, array)
    assert torch.equal(values[0, :, :, 3:-3], torch.ones(3, 64, 58))  # bicubic reaches 2 source pixels x 100 / 64
    stretched = pixels(processor, array, do_center_crop=False)
    assert stretched[0, :, 32, 0].tolist() == [1, -1, -1]
    assert stretched[0, :, 32, 63].tolist() == [1, -1, -1]
    assert stretched[0, :, 32, 32].tolist() == [1, 1, 1]


def test_resize_and_crop_equals_resize_then_crop(processor):
    array = np.random.default_rng(1).integers(64, 192, (128, 256, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(array).resize((128, 64), Image.Resampling.BICUBIC))
    expected = pixels(processor, resized[:, 32:96].copy())
    assert torch.equal(pixels(processor, array), expected)
    # Floats take the same way without PIL's 8-bit rounding after each of its two passes.
    torch.testing.assert_close(pixels(processor, array / 255), expected, rtol=0, atol=1.5 / 127.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (63, 65), (1000, 700)])
def test_any_aspect_ratio(processor, shape):
    values = pixels(processor, np.full((*shape, 3), 200, np.uint8))
    assert torch.equal(values, torch.full((1, 3, 64, 64), 200 / 127.5 - 1))


def test_size_need_not_be_square():
    processor = MMARImageProcessor(size={"height": 32, "width": 64})
    assert pixels(processor, Image.new("RGB", (100, 100))).shape == (1, 3, 32, 64)
    assert processor.size == {"height": 32, "width": 64}


def test_crop_alone_and_neither(processor, picture):
    _, array, expected = picture
    assert torch.equal(pixels(processor, array, size=32, do_resize=False), expected[..., 16:48, 16:48])
    with pytest.raises(ValueError, match="`size`"):
        processor(array, size=128, do_resize=False)
    small = np.zeros((8, 8, 3), np.uint8)
    kwargs = {"do_resize": False, "do_center_crop": False}
    assert [a.shape for a in processor([array, small], **kwargs)["pixel_values"]] == [(3, 64, 64), (3, 8, 8)]
    with pytest.raises(ValueError, match="one size"):
        processor([array, small], return_tensors="pt", **kwargs)


def test_pixels_are_rescaled_and_normalized_where_asked(processor):
    array = np.full((64, 64, 3), 51, np.uint8)
    assert pixels(processor, array, do_normalize=False).unique().item() == pytest.approx(0.2)
    assert pixels(processor, array, do_normalize=False, do_rescale=False).unique().item() == 51
    assert pixels(processor, array / 255, do_rescale=False).unique().item() == pytest.approx(-0.6)
    with pytest.raises(ValueError, match="do_rescale=True"):
        processor(array, do_rescale=False)


MEAN, STD = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]


@pytest.mark.parametrize("options", [{"image_mean": MEAN, "image_std": STD}, {"image_mean": 0.25}, {"image_std": 2}])
@pytest.mark.parametrize("at", ["class", "call", "loading"])
def test_mean_and_deviation(picture, tmp_path, options, at):
    _, array, _ = picture
    processor = MMARImageProcessor(size=64, **(options if at == "class" else {}))
    if at == "loading":
        processor.save_pretrained(tmp_path)
        processor = MMARImageProcessor.from_pretrained(tmp_path, **options)
    call = options if at == "call" else {}
    mean, std = (np.broadcast_to(options.get(name, 0.5), 3) for name in ("image_mean", "image_std"))
    expected = torch.from_numpy(np.moveaxis((array / 255 - mean) / std, -1, 0)[None]).float()
    for given in (array, array / 255):
        torch.testing.assert_close(pixels(processor, given, **call), expected, rtol=0, atol=1e-5)
    if at == "class":
        processor.save_pretrained(tmp_path)
        assert torch.equal(pixels(MMARImageProcessor.from_pretrained(tmp_path), array), pixels(processor, array))


def test_rescale_factor(picture):
    _, array, _ = picture
    expected = torch.from_numpy(np.moveaxis(array / 127.5, -1, 0)[None]).float()
    for processor, call in (
        (MMARImageProcessor(size=64, rescale_factor=1 / 127.5), {}),
        (MMARImageProcessor(size=64), {"rescale_factor": 1 / 127.5}),
    ):
        for given in (array, array / 255):  # one picture, whatever its range
            values = pixels(processor, given, do_normalize=False, **call)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
            values = pixels(processor, given, **call)
            torch.testing.assert_close(values, 2 * expected - 1, rtol=0, atol=1e-5)


def test_data_format(processor, picture):
    _, array, expected = picture
    assert torch.equal(pixels(processor, array, data_format="channels_last"), expected.permute(0, 2, 3, 1))
    assert torch.equal(pixels(processor, array, data_format="channels_first"), expected)


# What is refused


def test_broken_files(processor, picture, tmp_path):
    jpeg = file_bytes(picture[0], "JPEG")
    cases = {"empty.png": b"", "text.jpg": b"no picture", "half.jpg": jpeg[: len(jpeg) // 2]}
    png = file_bytes(picture[0])
    cases["half.png"] = png[: len(png) // 2]
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="empty, broken, truncated"):
            processor(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    # PIL opens lazily: the user's own Image may still be broken.
    with pytest.raises(ValueError, match="Picture 1 of 2: .*truncated"):
        processor([picture[0], Image.open(tmp_path / "half.jpg")])


def test_missing_file_and_folder(processor, tmp_path):
    with pytest.raises(ValueError, match="missing.png"):
        processor(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="is a folder"):
        processor(tmp_path)
    with pytest.raises(ValueError, match="base64"):
        processor("abcd")


def test_picture_bomb(processor, tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(ValueError, match="decompression bomb"):
        processor(path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 2), np.uint8), "1 or 3 or 4 channels"),
        (torch.zeros(5, 64, 64), "1 or 3 or 4 channels"),
        (np.zeros((0, 64, 3), np.uint8), "none of them 0"),
        (np.zeros((64,), np.uint8), r"\(H, W\)"),
        (Image.new("RGB", (0, 8)), "0 x 8"),
        (np.full((64, 64, 3), np.nan, np.float32), "NaN"),
        (torch.full((3, 64, 64), float("inf")), "NaN or infinity"),
        (np.full((64, 64, 3), 200.0), r"\[0, 1\]; got \[200, 200\].*x / 255"),
        (np.full((64, 64, 3), -0.5), r"\(x \+ 1\) / 2"),
        (np.full((64, 64, 3), 300, np.int32), r"\[0, 255\]"),
        (np.full((64, 64, 3), 1j), "complex"),
        (3, "got int"),
        ([], "at least one picture"),
        (None, "at least one picture"),
    ],
)
def test_bad_input(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


def test_bad_arguments(processor, picture):
    with pytest.raises(ValueError, match="crop_size"):
        processor(picture[0], crop_size=3)
    for unknown in ("crop_size", "do_pad", "pad_size", "image_meen", "max_pixels"):
        with pytest.raises(ValueError, match=unknown):
            MMARImageProcessor(**{unknown: 1})
        with pytest.raises(ValueError, match=unknown):
            processor(picture[0], **{unknown: 1})
        with pytest.raises(ValueError, match=unknown):
            MMARImageProcessor.from_dict({"size": {"height": 8, "width": 8}}, **{unknown: 1})
    for name, value in (
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "a"),
        ("image_std", 0),
        ("image_std", float("nan")),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("resample", "bicubic"),
    ):
        with pytest.raises(ValueError, match=name):
            MMARImageProcessor(**{name: value})
        with pytest.raises(ValueError, match=name):
            processor(picture[0], **{name: value})
    for name in ("data_format", "input_data_format"):
        with pytest.raises(ValueError, match=name):
            processor(picture[0], **{name: "first"})
    with pytest.raises(ValueError, match="device"):
        processor(picture[0], device="cpu")
    with pytest.raises(ValueError, match="size"):
        MMARImageProcessor(size=0)
    with pytest.raises(ValueError, match="size"):
        MMARImageProcessor(size={"shortest_edge": 64})
    with pytest.raises(ValueError, match="'L'"):
        processor(Image.new("L", (64, 64)), do_convert_rgb=False)


# Back to pictures


def test_round_trip_of_every_byte(processor):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    values = pixels(processor, array, size=16)
    assert np.array_equal(np.asarray(processor.postprocess(values)[0]), array)
    np.testing.assert_allclose(processor.postprocess(values, "np")[0], array / 255, rtol=0, atol=1e-7)
    tensor = processor.postprocess(values, output_type="pt")
    assert tensor.shape == (1, 3, 16, 16)
    # The float output goes back in without loss.
    torch.testing.assert_close(pixels(processor, tensor, size=16), values, rtol=0, atol=2e-7)


def test_postprocess_clips_and_reads_half_precision(processor):
    values = torch.tensor([-3.0, -1.0, 0.0, 3.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    images = processor.postprocess(values.bfloat16())
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 0, 128, 255]
    assert images[0].size == (2, 2)
    assert processor.postprocess(list(values), "np").shape == (4, 2, 2, 3)


def test_postprocess_refuses(processor):
    for value in (float("nan"), float("inf"), -float("inf")):
        values = torch.zeros(1, 3, 4, 4)
        values[0, 1, 2, 3] = value
        for output_type in ("pil", "np", "pt"):
            with pytest.raises(ValueError, match="black picture"):
                processor.postprocess(values, output_type)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        processor.postprocess(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="latent"):
        processor.postprocess(torch.zeros(1, 3, 4, 4), "latent")


# Saving


def test_save_and_load(tmp_path, picture):
    processor = MMARImageProcessor(size=48, resample=1, do_center_crop=False)
    processor.save_pretrained(tmp_path / "first")
    loaded = MMARImageProcessor.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    content = (tmp_path / "first" / "preprocessor_config.json").read_bytes()
    assert content == (tmp_path / "second" / "preprocessor_config.json").read_bytes()
    assert b'"AutoImageProcessor": "image_processing_mmar.MMARImageProcessor"' in content
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(pixels(loaded, picture[0]), pixels(processor, picture[0]))
    assert MMARImageProcessor.from_pretrained(tmp_path / "first", size=32).size == {"height": 32, "width": 32}


def test_defaults():
    processor = MMARImageProcessor()
    names = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
    assert all(map(lambda name: getattr(processor, name), names))
    assert processor.size == {"height": 256, "width": 256}
    assert processor.resample == Image.Resampling.BICUBIC
    assert processor.model_input_names == ["pixel_values"]

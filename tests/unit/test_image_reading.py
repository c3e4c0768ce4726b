"""read_image: equal forms, places only where they are allowed, bounds, formats, metadata."""

import base64
import io
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmar.processors import image_processing_mmar
from mmar.processors.image_processing_mmar import MMARImageProcessor, read_image, read_image_file


ARRAY = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
# Upright after 90 degrees clockwise.
TURNED = 6


def encoded(image=None, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    (Image.fromarray(ARRAY) if image is None else image).save(buffer, kind, **kwargs)
    return buffer.getvalue()


CONTENT = encoded()
TEXT = base64.b64encode(CONTENT).decode()
FORMS = {
    "PIL": lambda: Image.fromarray(ARRAY),
    "lazy PIL": lambda: Image.open(io.BytesIO(CONTENT)),
    "array": lambda: ARRAY,
    "tensor": lambda: torch.from_numpy(ARRAY),
    "bytes": lambda: CONTENT,
    "bytearray": lambda: bytearray(CONTENT),
    "memoryview": lambda: memoryview(CONTENT),
    "file object": lambda: io.BytesIO(CONTENT),
    "bytes and path": lambda: {"bytes": CONTENT, "path": None},
    "base64 and path": lambda: {"bytes": TEXT, "path": "a.png"},
    "base64": lambda: TEXT,
    "base64 as bytes": lambda: TEXT.encode(),
    "base64 of URLs": lambda: TEXT.replace("+", "-").replace("/", "_"),
    "base64 without padding": lambda: TEXT.rstrip("="),
    "base64 in lines": lambda: base64.encodebytes(CONTENT).decode(),
    "data URI": lambda: f"data:image/png;base64,{TEXT}",
    "data URI in capitals": lambda: f"DATA:image/png;BASE64,{TEXT}",
    "data URI with a character set": lambda: f"data:image/png;charset=utf-8;base64,{TEXT}",
    "percent-encoded base64": lambda: "data:image/png;base64," + TEXT.replace("+", "%2B").replace("=", "%3D"),
    "percent-encoded data URI": lambda: "data:image/png," + "".join(f"%{byte:02x}" for byte in CONTENT),
}


@pytest.fixture
def places(tmp_path):
    """The places of one file, by what they are."""
    path = tmp_path / "a picture.png"
    path.write_bytes(CONTENT)
    return {
        "path": path,
        "text": str(path),
        "URI": path.as_uri(),
        "URI of this machine": "FILE://localhost" + path.as_uri().removeprefix("file://"),
        "dictionary": {"bytes": None, "path": str(path)},
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("allowed", [True, False])
def test_forms_are_equal(form, allowed):
    processor = MMARImageProcessor(do_resize=False, do_center_crop=False)
    expected = processor(ARRAY)["pixel_values"]
    source = FORMS[form]()
    for _ in range(2):  # a file object can be read again
        assert np.array_equal(processor(read_image(source, places=allowed))["pixel_values"], expected)
    assert np.array_equal(processor(source)["pixel_values"], expected)


def test_places_are_the_callers(places):
    for name, place in places.items():
        assert np.array_equal(np.asarray(read_image(place)), ARRAY), name
        with pytest.raises(ValueError, match="image"):
            read_image(place, places=False)
    assert read_image_file(places["URI"]) == CONTENT
    with pytest.raises(ValueError, match="this machine"):
        read_image("file://elsewhere/a.png")
    with pytest.raises(ValueError, match="there"):
        read_image(places["URI"] + ".no")


@pytest.mark.parametrize(
    "source", [3, None, "", b"", {}, {"bytes": b""}, io.StringIO("text"), "data:", "ftp://a/b.png"]
)
def test_what_is_no_image(source):
    for allowed in (True, False):
        with pytest.raises(ValueError, match="must"):
            read_image(source, places=allowed)


def test_other_formats_are_not_opened(monkeypatch, tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    targa = encoded(kind="TGA")
    (tmp_path / "a.eps").write_bytes(postscript)
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    lazy = Image.open(io.BytesIO(postscript))
    for source in (postscript, io.BytesIO(postscript), tmp_path / "a.eps", lazy, targa):
        with pytest.raises(ValueError, match="AVIF"):
            read_image(source)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats(kind):
    assert np.array_equal(
        np.asarray(read_image(encoded(kind=kind)).convert("RGB")),
        np.asarray(Image.open(io.BytesIO(encoded(kind=kind))).convert("RGB")),
    )


def test_too_many_bytes_and_pixels(monkeypatch, places):
    monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_PIXELS", 8 * 9 - 1)
    for source in (CONTENT, Image.open(io.BytesIO(CONTENT)), TEXT, places["path"]):
        with pytest.raises(ValueError, match="71"):
            read_image(source)
    monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_BYTES", len(CONTENT) - 1)
    for source in (CONTENT, io.BytesIO(CONTENT), TEXT, f"data:;base64,{TEXT}", *places.values()):
        with pytest.raises(ValueError, match=f"{len(CONTENT) - 1}"):
            read_image(source)


def test_endless_file_object(monkeypatch):
    monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_BYTES", 2**20)
    with open("/dev/zero", "rb") as endless, pytest.raises(ValueError, match="1048576"):
        read_image(endless)


@pytest.fixture
def server():
    """Serves the image at /image, and what never ends elsewhere; `sent` counts the bytes of the last answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/image")
                self.end_headers()
                return
            self.send_response(200)
            if self.path == "/slow_head":
                for _ in range(40):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            self.end_headers()
            if self.path == "/image":
                self.wfile.write(CONTENT)
                return
            server.sent = 0
            try:
                while not server.is_done:
                    self.wfile.write(bytes(2**16 if self.path == "/endless" else 1))
                    server.sent += 2**16
                    time.sleep(0 if self.path == "/endless" else 0.1)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.is_done = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.is_done = True
    server.shutdown()
    server.server_close()


def test_urls_are_bounded(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    for path in ("image", "redirect"):
        assert np.array_equal(np.asarray(read_image(f"{address}/{path}")), ARRAY)
    with pytest.raises(ValueError, match="file"):
        read_image(f"{address}/image", places=False)
    monkeypatch.setattr(image_processing_mmar, "MAX_IMAGE_BYTES", 2**20)
    with pytest.raises(ValueError, match="1048576"):
        read_image(f"{address}/endless")
    assert server.sent < 2**24  # what the buffers of both ends hold above the bound
    monkeypatch.setattr(image_processing_mmar, "URL_TOTAL_TIMEOUT", 0.5)
    for path in ("slow", "slow_head"):
        start = time.monotonic()
        with pytest.raises(ValueError, match="0.5"):
            read_image(f"{address}/{path}")
        assert time.monotonic() - start < 3


# A directory of one entry, the orientation, up to its type.
ORIENTATION = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01"
JUNK = {
    "no TIFF": b"Exif\x00\x00junk",
    "no directory": b"Exif\x00\x00II*\x00\xff\xff\xff\x7f",
    "nothing": b"Exif\x00\x00",
    "cut": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12",
    "a text for the orientation": ORIENTATION + b"\x02\x00\x02\x00\x00\x006\x00\x00\x00",
    "nine": ORIENTATION + b"\x03\x00\x01\x00\x00\x00\x09\x00\x00\x00",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Metadata Warning")
def test_junk_metadata_turns_nothing(kind, junk):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(kind=kind, exif=JUNK[junk], **lossless)
    expected = Image.open(io.BytesIO(encoded(kind=kind, **lossless))).convert("RGB").tobytes()
    processor = MMARImageProcessor(do_resize=False, do_center_crop=False)
    for source in (content, Image.open(io.BytesIO(content))):
        image = read_image(source)
        assert image.size == (9, 8) and image.convert("RGB").tobytes() == expected
        assert read_image(image).tobytes() == image.tobytes()
        assert processor(image)["pixel_values"].shape == (1, 3, 8, 9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_once(kind):
    exif = Image.Exif()
    exif[0x0112] = TURNED
    content = encoded(kind=kind, exif=exif)
    plain = np.asarray(Image.open(io.BytesIO(encoded(kind=kind))))
    for source in (content, Image.open(io.BytesIO(content))):
        image = read_image(source)
        assert np.array_equal(np.asarray(image), np.rot90(plain, k=-1))
        assert np.array_equal(np.asarray(read_image(image)), np.asarray(image))


def test_messages_are_short(tmp_path):
    for source in ("x" * 10**6 + ".png", b"no picture" * 10**5, {"path": "y" * 10**6}, "data:" + "z" * 10**6):
        with pytest.raises(ValueError) as failure:
            read_image(source)
        assert len(str(failure.value)) < 1000


def test_path_objects_are_paths_only():
    with pytest.raises(ValueError, match="exists"):
        read_image(Path(TEXT[:60]))

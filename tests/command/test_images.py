"""Images of every kind that a user may name: read, or refused in one line."""

import contextlib
import http.server
import io
import json
import re
import sys
import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from support import main, refused

from teacache.base.errors import ImageError
from teacache.inputs import photograph as pictures
from teacache.inputs.photograph import load_image, pixels_sha256
from teacache.inputs.photograph_store import PhotographStore

TINY = ("--ckpts_path", "tiny", "--image")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))


IPHONE = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is no image that can be read: save it as JPEG or PNG"),
        (IPHONE, "is HEIC: pip install pillow-heif==1.8.1, or convert it: heif-convert"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0miafavif", "is AVIF: save it as JPEG or PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is JPEG XL: save it as JPEG or PNG"),
        (b"\xff\x0a\xfa\x1f", "is JPEG XL"),
        (b"%PDF-1.7\n", "is PDF"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made by hand -->\n<svg width='9'>", "is SVG"),
        (b"<!DOCTYPE html><html><svg></svg></html>", "is a web page"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "is a camera's RAW file"),
        (b"II*\0\x10\0\0\0CR\2" + bytes(20), "is a camera's RAW file"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "is a video"),
    ],
)
def test_no_image(tmp_path, monkeypatch, content, complaint):
    """Whatever its name says, and where nothing but Pillow is installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=re.escape(complaint)) as raised:
        load_image(str(path))
    assert str(raised.value).startswith(f"--image {path} is ")


def test_half_a_file_and_a_thumbnail(capsys, tmp_path, photo):
    """What a phone and a camera write as DNG and NEF begins with a small TIFF."""
    whole = encoded(photo, "PNG")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(capsys, *TINY, tmp_path / "half.png")
    for tags in ({50706: b"\1\4\0\0"}, {254: 1}):
        photo.save(tmp_path / "me.dng", "TIFF", tiffinfo=tags)
        assert "is a camera's RAW file" in refused(capsys, *TINY, tmp_path / "me.dng")


def test_heic(tmp_path, photo):
    """Turned as a phone turns it, and named as mail programs do."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = photo.resize((8, 6)).resize((320, 240), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "IMG_0001.jpg", "HEIF", quality=90, exif=exif.tobytes())
    found, expected = load_image(str(tmp_path / "IMG_0001.jpg")), smooth.rotate(-90, expand=True)
    assert found.size == (240, 320)
    # HEVC at quality 90 and 4:2:0 colour move smooth pixels by a few levels.
    assert np.abs(np.asarray(found) - np.asarray(expected).astype(float)).mean() < 4
    (tmp_path / "half.heic").write_bytes((tmp_path / "IMG_0001.jpg").read_bytes()[:500])
    with pytest.raises(ImageError, match=r"heic (is HEIC: save|cannot be read)"):
        load_image(str(tmp_path / "half.heic"))


@pytest.mark.parametrize(
    "what", ["missing.png", "folder", "pointer.png", "ftp://host/face.png", "http:///x.png"]
)
def test_refused_as_an_argument(capsys, tmp_path, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "pointer.png").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    )
    source = what if "://" in what else tmp_path / what
    assert refused(capsys, *TINY, source).startswith("error: argument --image: ")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_socks_proxy_needs_a_package(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, f"socks5{'h' * (variable == 'ALL_PROXY')}://me:secret@127.0.0.1:9")
    error = refused(capsys, *TINY, "https://example.com/a.jpg")
    assert error.endswith("cannot be fetched: a SOCKS proxy needs pysocks: pip install pysocks")


def test_a_picture_too_large_is_refused_by_its_header(capsys, tmp_path, monkeypatch):
    """One of 20,000 x 20,000 and one colour is a small file; decoded, it would take 1.2 GB."""
    path = tmp_path / "large.png"
    Image.new("1", (11_000, 10_000)).save(path)
    monkeypatch.setattr(pictures, "upright_rgb", lambda image: pytest.fail("it was decoded"))
    error = refused(capsys, *TINY, path)
    assert error == f"error: --image {path} has more than 100 million pixels: make it smaller"


def test_pictures_of_every_kind(tmp_path, photo, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    veiled, half = photo.convert("RGBA"), photo.convert("RGBA")
    veiled.putalpha(0)
    half.putalpha(128)
    on_white = (np.asarray(photo) * 128.0 + 255 * 127) / 255
    palette = Image.new("P", photo.size)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    grey = photo.convert("L")
    numbers = np.asarray(grey).astype(np.uint16)
    white = Image.new("RGB", photo.size, "white")

    def floats(values):
        return Image.fromarray(values.astype(np.float32))

    frames = [palette.convert("RGB"), photo]
    for name, picture, options, expected in (
        ("turned.png", photo, {"exif": exif}, photo.rotate(180)),
        ("veiled.png", veiled, {}, white),
        ("half.png", half, {}, on_white),
        ("palette.png", palette, {"transparency": 0}, white),
        ("sixteen.png", Image.fromarray(numbers * 257), {}, grey),
        ("sixteen.tif", Image.fromarray((numbers * 257).astype(">u2")), {}, grey),
        ("twelve.tif", Image.fromarray(numbers * 257 >> 4), {}, grey),
        ("one.tif", floats(numbers / 255), {}, grey),
        ("bytes.tif", floats(numbers), {}, grey),
        ("overshoot.tif", floats(numbers / 250), {}, grey.point(lambda x: min(255, x * 1.02))),
        ("grey.png", grey.convert("LA"), {}, grey),
        ("palette.tif", grey.convert("P").convert("PA"), {}, grey),
        ("moving.gif", white, {"save_all": True, "append_images": frames}, white),
        ("moving.webp", white, {"save_all": True, "append_images": frames}, white),
        ("print.tif", photo.convert("CMYK"), {}, photo.convert("CMYK").convert("RGB")),
    ):
        picture.save(tmp_path / name, **options)
        found = load_image(str(tmp_path / name))
        assert found.mode == "RGB"
        if not isinstance(expected, np.ndarray):
            expected = np.asarray(expected.convert("RGB"))
        # Other scales, and half transparent pixels, are rounded to whole numbers.
        most = 1 if name.startswith(("half", "twelve", "one", "overshoot")) else 0
        assert np.abs(np.asarray(found) - expected.astype(float)).max() <= most, name
    for name in ("moving.gif", "moving.webp"):
        assert f"{name} has 3 frames: the first is taken" in caplog.text


@pytest.mark.parametrize("change", [
    lambda x: x * 10, lambda x: x * 1e6, lambda x: np.where(x > 0.99, 200, x * 3),
    lambda x: x - 0.5, lambda x: x * [[np.nan]], lambda x: (x * 2**30).astype(np.int32),
])  # fmt: skip
def test_numbers_of_no_usual_scale_are_not_read_as_black(tmp_path, change):
    """Of light, of depth, of measurements: who has them knows what is white in them."""
    values = change(np.linspace(0, 1, 4800, dtype=np.float32).reshape(60, 80))
    Image.fromarray(values).save(tmp_path / "light.tif")
    with pytest.raises(ImageError, match="are of no usual scale: save it with 8 bits"):
        load_image(str(tmp_path / "light.tif"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each path in its own wrong way, and counts."""

    asked: ClassVar[Counter] = Counter()

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, body, times = self.path, self.server.picture, 1
        self.asked[path] += 1
        if path == "/silence":
            time.sleep(5)
        self.send_response(404 if path == "/none.png" else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if path == "/page" else "image")
        if path == "/large":
            body, times = b"x" * 2**20, 200
        else:
            self.send_header("Content-Length", str(len(body) + 100 * (path == "/half")))
        with contextlib.suppress(ConnectionError):  # the reader has had enough, as it should
            self.end_headers()
            for _ in range(times):
                self.wfile.write(body)


@pytest.fixture(scope="module")
def url():
    """Of a server, with a password."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.picture = True, encoded(load_image("astronaut"), "PNG")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://name:s3cr3t@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_from_a_server(url, capsys, tmp_path):
    """The picture is the file's, and no record says what lets a reader in."""
    asked = ("--rel_l1_thresh", 0, "--num_infer_steps", 1, "--num_frames", 1)
    asked += ("--image", f"{url}/face.png?token=s3cr3t", "--output_path", tmp_path)
    code, output, error = main(capsys, "--ckpts_path", "tiny", *asked)
    assert code == 0
    record = (tmp_path / "42_0.0_0000.json").read_text()
    shown = f"{url.replace('name:s3cr3t', '***')}/face.png?token=***"
    assert json.loads(record)["image"] == shown
    assert json.loads(record)["image_sha256"] == pixels_sha256(load_image("astronaut"))
    assert "s3cr3t" not in output + error + record


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/none.png", "the server answers 404 Not Found"),
        ("/page", "is a page of text, not an image"),
        ("/large", "is larger than 50 MB"),
        ("/silence", "cannot be fetched: read timeout"),
        ("/half", "cannot be fetched: chunked encoding error"),
        ("http://me:s3cr3t@127.0.0.1:9/a.png", "connection error (connection refused)"),
    ],
)
def test_a_server_that_does_not_give_an_image(url, monkeypatch, path, complaint):
    monkeypatch.setattr(pictures, "READ_SECONDS", 0.7)
    with pytest.raises(ImageError) as raised:
        load_image(path if "://" in path else url + path)
    assert str(raised.value).startswith("--image http://***@127.0.0.1")
    assert complaint in str(raised.value)
    assert not re.search(r"\n|s3cr3t", str(raised.value))


def test_a_photograph_is_fetched_once(url):
    """Also where others have been looked at meanwhile, and it is decoded again."""
    store, paths = PhotographStore(), ["/face.png?first", "/face.png?second"]
    seen = [store.look_at(url + path).sha256 for path in paths]
    assert [pixels_sha256(store.load(url + path)) for path in paths] == seen
    assert [Handler.asked[path] for path in paths] == [1, 1]


def test_a_photograph_that_changes_meanwhile_is_refused(tmp_path):
    first, second = (tmp_path / name for name in ("me.png", "other.png"))
    store = PhotographStore()
    for path in (first, second):
        Image.new("RGB", (8, 8), "red").save(path)
        store.look_at(str(path))
    Image.new("RGB", (8, 8), "blue").save(first)
    with pytest.raises(ImageError, match=r"me.png has changed since this run began"):
        store.load(str(first))

"""Images of every kind that a user may name: read, or refused in one line."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import changed_retinaface, everywhere, main

from teacache.base.errors import ImageError
from teacache.inputs import photograph as pictures
from teacache.inputs.photograph import load_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def command(capsys, image, folder) -> tuple[int, str, str]:
    """The command with this image, as far as that lets it."""
    return main(capsys, "--ckpts_path", "tiny", "--image", image, "--output_path", folder)


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))


@pytest.fixture(scope="module")
def seeing_faces(tiny, tmp_path_factory):
    """The checkpoint with a RetinaFace that sees a face in any picture."""
    return changed_retinaface(tiny, tmp_path_factory.mktemp("seeing") / "checkpoint", everywhere)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jpg", b"", "is no image that can be read"),
        ("text.png", b"not an image", "is no image that can be read"),
        ("iphone.png", b"\0\0\0\x20ftypheic\0\0\0\0mif1heic", "JPEG or PNG, not as HEIC"),
        ("half.jpg", None, "truncated"),
        ("half.png", None, "truncated"),
    ],
)
def test_broken_files(capsys, tmp_path, photo, name, content, complaint):
    kind = {"jpg": "JPEG", "png": "PNG"}[name[-3:]]
    whole = encoded(photo, kind)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    code, output, error = command(capsys, tmp_path / name, tmp_path / "o")
    assert code == 2
    assert error.startswith(f"error: --image {tmp_path / name} ")
    assert complaint in error
    assert error.count("\n") == 1
    assert "diffusers" not in output, "before anything is loaded"


@pytest.mark.parametrize("what", ["missing.png", "folder", "ftp://host/face.png", "http:///x.png"])
def test_refused_as_an_argument(capsys, tmp_path, what):
    (tmp_path / "folder").mkdir()
    source = what if "://" in what else tmp_path / what
    code, output, error = main(capsys, "--ckpts_path", "tiny", "--image", source)
    assert (code, output) == (2, "")
    assert error.startswith("error: argument --image: ")
    assert error.count("\n") == 1


def test_a_picture_too_large_is_refused_by_its_header(capsys, tmp_path, monkeypatch):
    """One of 20,000 x 20,000 and one colour is a small file; decoded, it would take 1.2 GB."""
    path = tmp_path / "large.png"
    Image.new("1", (11_000, 10_000)).save(path)
    monkeypatch.setattr(pictures, "upright_rgb", lambda image: pytest.fail("it was decoded"))
    code, output, error = command(capsys, path, tmp_path / "o")
    assert code == 2
    assert error == (f"error: --image {path} has more than 100 million pixels: make it smaller\n")
    assert "diffusers" not in output


def test_pictures_of_every_kind_become_videos(capsys, tmp_path, photo, seeing_faces):
    """One run over all of them; the record tells what pixels each was taken for."""
    photo = photo.resize((200, 160))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    veiled = photo.convert("RGBA")
    veiled.putalpha(0)
    palette = Image.new("P", photo.size)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    grey = photo.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    white = Image.new("RGB", photo.size, "white")
    made = {  # of each file: what is written, how, and the picture that it is
        "turned.png": (photo, {"exif": exif}, photo.rotate(180)),
        "veiled.png": (veiled, {}, white),
        "palette.png": (palette, {"transparency": 0}, white),
        "sixteen.png": (sixteen, {}, grey.convert("RGB")),
        "moving.gif": (
            white,
            {"save_all": True, "append_images": [palette.convert("RGB"), photo]},
            white,
        ),
        "print.tif": (photo.convert("CMYK"), {}, photo.convert("CMYK").convert("RGB")),
    }
    lines = []
    for name, (picture, options, _) in made.items():
        picture.save(tmp_path / name, **options)
        lines.append(json.dumps({"image": str(tmp_path / name)}))
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    code, _, error = main(
        capsys,
        *("--ckpts_path", seeing_faces, "--jobs", tmp_path / "jobs.jsonl", "--rel_l1_thresh", 0),
        *("--num_infer_steps", 1, "--num_frames", 1, "--output_path", tmp_path / "out"),
    )
    assert code == 0
    assert "moving.gif has 3 frames: the first is taken" in error
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("42_*.json")]
    found = {record["image"]: record["image_sha256"] for record in records}
    assert found == {
        str(tmp_path / name): hashlib.sha256(expected.tobytes()).hexdigest()
        for name, (*_, expected) in made.items()
    }


def test_what_is_half_transparent_lies_on_white(tmp_path, photo):
    veiled = photo.convert("RGBA")
    veiled.putalpha(128)
    veiled.save(tmp_path / "veiled.png")
    found = np.asarray(load_image(str(tmp_path / "veiled.png"))).astype(int)
    assert np.abs(found - (np.asarray(photo) * 128.0 + 255 * 127) / 255).max() <= 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"]),
    mode=st.sampled_from(["RGB", "L", "1", "P", "RGBA"]),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_damaged_images_are_read_or_refused(tmp_path, kind, mode, cut, damage):
    picture = Image.effect_noise((24, 16), 50).convert(mode)
    try:
        content = bytearray(encoded(picture, kind))
    except OSError:  # a format without that mode
        return
    content = content[: int(len(content) * cut)]
    for place, value in damage:
        if content:
            content[int(place * len(content))] = value
    (tmp_path / "image").write_bytes(bytes(content))
    complaint = ""
    try:
        assert load_image(str(tmp_path / "image")).mode == "RGB"
    except ImageError as error:
        complaint = str(error)
    assert "\n" not in complaint


class Server(http.server.ThreadingHTTPServer):
    """Answers each path in its own wrong way."""

    daemon_threads = True

    def __init__(self, picture: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.picture = picture
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        if self.path.startswith("/face.png"):
            self.answer(200, "image/png", server.picture)
        elif self.path == "/page":
            self.answer(200, "text/html; charset=utf-8", b"<html></html>")
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the reader has had enough, as it should
                for _ in range(200):
                    self.wfile.write(b"x" * 2**20)
            self.close_connection = True
        elif self.path == "/silence":
            time.sleep(5)
        elif self.path == "/half":
            self.answer(200, "image/png", server.picture, length=len(server.picture) + 100)
        else:
            self.answer(404, "text/html", b"no")

    def answer(self, code, kind, body, length=None):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    picture = encoded(Image.new("RGB", (30, 20), "red"), "PNG")
    server = Server(picture)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_from_a_server(server, capsys, tmp_path, seeing_faces):
    url = server.url.replace("://", "://name:s3cr3t@") + "/face.png?token=s3cr3t"
    image = load_image(url)
    assert (image.size, image.getpixel((0, 0))) == ((30, 20), (255, 0, 0))
    code, output, error = main(
        capsys,
        *("--ckpts_path", seeing_faces, "--image", url, "--rel_l1_thresh", 0),
        *("--num_infer_steps", 1, "--num_frames", 1, "--output_path", tmp_path),
    )
    assert code == 0
    record = (tmp_path / "42_0.0_0000.json").read_text()
    shown = server.url.replace("://", "://***@") + "/face.png?token=***"
    assert json.loads(record)["image"] == shown
    assert "s3cr3t" not in output + error + record


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/none.png", "the server answers 404 Not Found"),
        ("/page", "is a page of text, not an image"),
        ("/loop", "cannot be fetched: too many redirects"),
        ("/large", "is larger than 50 MB"),
        ("/silence", "cannot be fetched: read timeout"),
        ("/half", "cannot be fetched: chunked encoding error"),
    ],
)
def test_a_server_that_does_not_give_an_image(
    server, capsys, tmp_path, monkeypatch, path, complaint
):
    monkeypatch.setattr(pictures, "READ_SECONDS", 0.7)
    code, output, error = command(
        capsys, server.url.replace("://", "://name:secret@") + path, tmp_path
    )
    assert code == 2
    assert error.startswith("error: --image http://***@127.0.0.1")
    assert complaint in error
    assert error.count("\n") == 1
    assert "secret" not in output + error


def test_a_bundle_of_certificates_that_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    code, _, error = command(capsys, "https://127.0.0.1:9/a.png", tmp_path)
    assert code == 2
    assert "cannot be fetched: Could not find a suitable TLS CA certificate bundle" in error
    assert error.count("\n") == 1


def test_a_server_that_does_not_take_the_connection(capsys, tmp_path, monkeypatch):
    """It listens, and its queue is full: the system leaves who comes then without an answer."""
    monkeypatch.setattr(pictures, "CONNECT_SECONDS", 0.5)
    with contextlib.ExitStack() as sockets:
        listening = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        code, _, error = command(
            capsys, f"http://127.0.0.1:{listening.getsockname()[1]}/a.png", tmp_path
        )
    assert code == 2
    assert "cannot be fetched: connect timeout" in error


def test_nobody_answers(capsys, tmp_path):
    code, _, error = command(capsys, "http://me:secret@127.0.0.1:9/a.png", tmp_path)
    assert code == 2
    assert "cannot be fetched: connection error (connection refused)" in error
    assert "secret" not in error
    assert (pictures.CONNECT_SECONDS, pictures.READ_SECONDS) == (10, 30)

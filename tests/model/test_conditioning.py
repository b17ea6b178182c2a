"""Embeddings of faces and prompts that are kept from run to run."""

import os
import re

import pytest
import torch
from safetensors.torch import save
from support import CPU, main

from teacache.base.files import fingerprint
from teacache.inputs import conditioning as module
from teacache.inputs import identity as faces
from teacache.inputs.conditioning import Conditioning
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.photograph_store import PhotographStore


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "embeddings")


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that are loaded, in order."""
    names = []
    for owner, name in ((faces, "load_face_models"), (module, "load_pipeline")):
        load = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, load=load, name=name, **k: names.append(name) or load(*a, **k)
        )
    return names


def make(tiny, cache, dtype=torch.float32):
    return Conditioning(tiny, CPU, dtype, "none", cache)


def test_what_is_kept_equals_what_was_computed(tiny, cache, loads):
    images = ["astronaut"], PhotographStore()
    texts = ["she laughs", "rain " * 300, "", "in ὄνος 雨"]
    for dtype in (torch.float32, torch.bfloat16):
        loads.clear()
        computed = make(tiny, cache, dtype)
        first = computed.find_faces(*images)["astronaut"], computed.embed_texts(texts)
        assert loads == ["load_face_models", "load_pipeline"]
        kept = make(tiny, cache, dtype)
        second = kept.find_faces(*images)["astronaut"], kept.embed_texts(texts)
        assert loads == ["load_face_models", "load_pipeline"], "no model was loaded again"
        assert first[0].keys() == second[0].keys()
        assert all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())
        assert first[0]["id_cond"].dtype == second[0]["id_cond"].dtype == dtype
        for text in texts:
            assert torch.equal(first[1][text].embeds, second[1][text].embeds)
            assert first[1][text][1:] == second[1][text][1:]
        assert "rain" in second[1]["rain " * 300].lost
        assert second[1]["in ὄνος 雨"].unknown == "ὄνος 雨"


LONG = "is longer than 226 tokens: without"
UNREAD = "has what the text encoder cannot read, write it in English"


@pytest.mark.parametrize(
    ("prompt", "negative", "lines"),
    [
        ("🚀 man, 笑 🚀", "}", [f"prompt {UNREAD}: '🚀 笑'", f"negative_prompt {UNREAD}: '}}'"]),
        (f"Ω{' rain' * 225} Ж", "", [f"prompt {LONG} '[^Ω]*Ж'; and it {UNREAD}: 'Ω'"]),
    ],
)  # fmt: skip
def test_what_the_video_does_not_follow_is_named(capsys, tmp_path, prompt, negative, lines):
    """A line for each prompt, also where its embedding is that of an earlier run."""
    quick = ("--ckpts_path", "tiny", "--num_infer_steps", 1, "--num_frames", 1)
    quick += ("--output_path", tmp_path)
    lines = [
        "num_frames 1: the checkpoint has learned positional embeddings for 13 frames; .*",
        *lines,
    ]
    for _ in range(2):
        code, _, error = main(capsys, *quick, "--prompt", prompt, "--negative_prompt", negative)
        assert code == 0
        assert re.fullmatch("".join(f"warning: --{line}\n" for line in lines), error), error


def test_only_what_is_missing_is_computed(tiny, cache, monkeypatch):
    make(tiny, cache).embed_texts(["one"])
    embedded, embed = [], module.embed_text
    monkeypatch.setattr(module, "embed_text", lambda p, t: embedded.append(t) or embed(p, t))
    make(tiny, cache).embed_texts(["one", "two"])
    assert embedded == ["two"]


def test_whatever_the_embeddings_depend_on_is_in_their_name(tiny, cache, monkeypatch):
    image = PhotographStore().look_at("astronaut")
    plain, half = make(tiny, cache), torch.bfloat16
    face, text = plain.face_key(image), plain.text_key("one")
    assert plain.text_key("two") != text
    assert plain.face_key(image._replace(sha256="0")) != face
    assert plain.face_key(image._replace(height=511)) != face
    assert make(tiny, cache, half).text_key("one") != text
    assert make(tiny, cache, half).face_key(image) != face
    version = module.installed_version
    monkeypatch.setattr(
        module, "installed_version", lambda p: version(p) + ("+" if p == "torch" else "")
    )
    assert make(tiny, cache).text_key("one") != text
    assert make(tiny, cache).face_key(image) != face


def test_a_changed_checkpoint_has_another_fingerprint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    before = fingerprint([file])
    assert fingerprint([file]) == before
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert fingerprint([file]) != before, "by its content"
    file.write_bytes(b"one")
    assert fingerprint([file]) != before, "by its time of change"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: save({"other": torch.zeros(3)}),
    ],
    ids=["short", "header too large", "of something else"],
)
def test_a_damaged_entry_is_made_anew(cache, damage, caplog):
    key, tensors = {"text": "one"}, {"embeds": torch.randn(3, 4)}
    cache.put(key, tensors)
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache.get(key, ["embeds"]) is None
    assert caplog.text.count("is damaged and is computed again") == 1
    assert not entry.exists()
    cache.put(key, tensors)
    assert torch.equal(cache.get(key, ["embeds"])["embeds"], tensors["embeds"])


def test_what_has_not_been_read_for_longest_goes_first(tmp_path):
    cache = EmbeddingCache(tmp_path, most_bytes=3500)
    for n in range(3):  # of about 1.1 kB each
        cache.put({"n": str(n)}, {"x": torch.full((256,), float(n))})
        os.utime(cache.path_of({"n": str(n)}), ns=(n, n))
    assert cache.get({"n": "0"}, ["x"])["x"][0] == 0  # read: now the newest
    cache.put({"n": "3"}, {"x": torch.full((256,), 3.0)})
    kept = [cache.get({"n": str(n)}, ["x"]) is not None for n in range(4)]
    assert kept == [True, False, True, True]


def test_a_cache_that_cannot_be_written_to_is_none(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = EmbeddingCache(blocked / "embeddings")
    assert cache.get({"n": "0"}, ["x"]) is None
    cache.put({"n": "0"}, {"x": torch.zeros(1)})
    assert "embeddings cannot be cached" in caplog.text


def test_what_is_kept_lies_where_torch_would_put_it(cache):
    """A matrix product of a CPU may sum up in another order where its input is not aligned."""
    for number in range(20):
        cache.put({"number": str(number)}, {"x": torch.ones(1000 + number)})
        found = cache.get({"number": str(number)}, ("x",))
        assert found["x"].data_ptr() % 64 == 0

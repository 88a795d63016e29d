"""Downloads of weights, from a loopback server that breaks off or lies."""

import hashlib
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

import vmamba
from vmamba.errors import UserError
from vmamba.models import variants
from vmamba.models.download import download

from .small import SMALL, same


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


class Server(ThreadingHTTPServer):
    """Serves `content` at /w.pth, at most `most` bytes an answer; notes the first byte of each."""

    content, most, validator, starts = b"", 2**40, '"one"', ()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/w.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server: Server = self.server
        if self.path != "/w.pth":
            return self.send_error(404)
        asked = self.headers.get("Range", "bytes=0-")
        changed = self.headers.get("If-Range", server.validator) != server.validator
        start = 0 if changed else int(asked.removeprefix("bytes=").removesuffix("-"))
        server.starts += (start,)
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.validator)
        self.send_header("Content-Length", str(len(server.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(server.content[start : start + server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(released):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = released.read_bytes()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def variant(monkeypatch, server):
    """ "vmamba_tiny", its weights at the server's."""
    entry = replace(variants.VARIANTS["vmamba_tiny"], weights=server.url, sha256=digest(server.content))
    monkeypatch.setitem(variants.VARIANTS, "vmamba_tiny", entry)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_a_name_with_its_weights(hub, server, variant, averaged, said):
    for _ in range(2):  # the second time from the cache
        target = vmamba.create_model("vmamba_tiny", pretrained=True, **SMALL)
        assert not same(target.state_dict(), averaged)  # another number of classes than 1000: a new head
        kept = {name for name in averaged if ".head." not in name}
        assert all(torch.equal(target.state_dict()[name], averaged[name]) for name in kept)
    assert server.starts == (0,)
    for part in (
        f"downloading {server.url}",
        "has the SHA-256 expected",
        "downloaded earlier",
        "dropped the head of 5",
    ):
        assert part in said()


def test_names_with_weights():
    names = vmamba.list_models(pretrained=True)
    assert vmamba.list_models("*tiny*") == ["vmamba_tiny", "vmamba_tiny_m2", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"]
    assert vmamba.list_models() == timm.list_models("vmamba_*")
    assert vmamba.list_models("*base*", exclude_filters=["*s2*", "*m2"]) == ["vmamba_base", "vmamba_base_s1l20"]
    without = timm.list_models("vmamba_*", exclude_filters="*_s*")
    assert vmamba.list_models(exclude_filters="*_s*") == without
    assert vmamba.list_models("*tiny*", pretrained=True) == vmamba.list_models("*tiny*", exclude_filters="*_m2")
    assert vmamba.list_models(["*_s1l8", "*digits"]) == ["vmamba_digits", "vmamba_tiny_s1l8"]
    assert vmamba.list_models("nothing") == []
    for wrong in (True, 3, [True]):
        with pytest.raises(UserError, match="; give a pattern such as"):
            vmamba.list_models(wrong)
        with pytest.raises(UserError, match="exclude_filters is .*; give a pattern such as"):
            vmamba.list_models(exclude_filters=wrong)
    assert names == [name for name in vmamba.list_models() if not name.endswith(("_m2", "_digits", "_nano"))]
    for name in names:
        assert variants.VARIANTS[name].weights.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
    with pytest.raises(UserError, match="'vmamba_digits' has no released weights; these have: vmamba_base, "):
        vmamba.create_model("vmamba_digits", pretrained=True)


def test_an_address_is_read_like_a_file(hub, server, averaged):
    assert same(vmamba.load_checkpoint(server.url).state_dict, averaged)
    assert (hub / "w.pth").read_bytes() == server.content


def test_a_broken_download_goes_on_where_it_broke_off(hub, server):
    server.most = len(server.content) // 3
    assert download(server.url, digest(server.content)).read_bytes() == server.content
    third = server.most
    assert server.starts[:3] == (0, third, 2 * third)


def test_a_part_of_an_earlier_call_is_completed_or_replaced_when_the_file_changed(hub, server):
    server.most, whole = 1000, server.content
    server.content = whole[:1000]
    download(server.url)
    (hub / "w.pth").rename(hub / "w.pth.part")
    server.content, server.most, server.starts = whole, 2**40, ()
    assert download(server.url).read_bytes() == whole
    assert server.starts == (1000,)
    (hub / "w.pth").rename(hub / "w.pth.part")
    os.truncate(hub / "w.pth.part", 1000)
    server.content, server.validator, server.starts = whole[::-1], '"two"', ()
    assert download(server.url).read_bytes() == whole[::-1]
    assert server.starts == (0,)


def test_a_download_that_was_complete_but_for_its_name(hub, server):
    download(server.url)
    (hub / "w.pth").rename(hub / "w.pth.part")
    assert download(server.url).read_bytes() == server.content


def test_a_download_that_brings_nothing_more_ends_with_a_sentence(hub, server, monkeypatch):
    monkeypatch.setattr(Server, "most", 0)
    with pytest.raises(UserError, match=rf"broke off after 0 of {len(server.content)} bytes; try again.*hub/checkp"):
        download(server.url)
    assert not (hub / "w.pth").exists()


def test_a_wrong_hash_is_never_loaded(hub, server, variant, monkeypatch):
    server.content = server.content[::-1]
    for _ in range(2):
        with pytest.raises(UserError, match=r"w\.pth.*' has SHA-256 \w+ and not \w+, .*delete it"):
            vmamba.create_model("vmamba_tiny", pretrained=True, **SMALL)
    assert not (hub / "w.pth").exists()


def test_a_missing_file_and_no_network_say_what_to_put_where(hub, server):
    place = rf"put it at '{hub}/"
    with pytest.raises(UserError, match=rf"/gone\.pth answers 404 .*{place}gone\.pth'"):
        download(server.url.replace("w.pth", "gone.pth"))
    closed = Server(("127.0.0.1", 0), Handler)
    closed.server_close()
    with pytest.raises(UserError, match=rf"cannot be downloaded \(.*refused.*{place}w\.pth'"):
        download(closed.url)
    assert [path.name for path in Path(hub).iterdir()] == []


def test_a_cache_that_is_no_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write '.*w\.pth': Not a directory; set TORCH_HOME to another folder"):
        download("http://127.0.0.1:9/w.pth")


def test_two_addresses_do_not_share_a_file(hub, server):
    download(server.url)
    with pytest.raises(UserError, match="was downloaded from"):
        download(server.url.replace("127.0.0.1", "localhost"))
    (hub / "hand.pth").write_bytes(b"put there by hand")
    assert download("http://127.0.0.1:9/hand.pth").read_bytes() == b"put there by hand"

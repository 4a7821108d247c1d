"""`weights pull` against a real HTTP server on localhost that speaks the hub's few endpoints."""

import hashlib
import json
import random
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.pull import main

REPO = "someone/mochi"
COMMIT = "c" * 40
LARGE = ("dit.safetensors", "encoder.safetensors", "decoder.safetensors", "text_encoder/model.safetensors")
SMALL = ("text_encoder/config.json", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json")
UNWANTED = (
    "README.md",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.bf16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.bin",
)


class Hub:
    """The hub and its storage host: two ports, files in memory, a log of requests, and faults to inject."""

    def __init__(self):
        rng = random.Random(0)
        sizes = dict.fromkeys(LARGE, 200_000) | {"dit.safetensors": 3_000_001} | dict.fromkeys(SMALL + UNWANTED, 700)
        self.files = {name: rng.randbytes(size) for name, size in sizes.items()}
        self.listed = {name: listing(name, content) for name, content in self.files.items()}
        self.requests = []  # (host, name, first byte asked for, authorization)
        self.cut_after = {}  # name -> the byte counts after which its coming answers are cut
        self.down = set()
        self.ignores_ranges = False
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self.handler(host)) for host in ("hub", "storage")]
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self.servers]
        for thread in self.threads:
            thread.start()

    def close(self):
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def address(self, index=0):
        return f"http://127.0.0.1:{self.servers[index].server_address[1]}"

    def fetched(self):
        return [name for host, name, _, _ in self.requests if host in ("storage", "cache")]

    def starts(self, name):
        return [start for host, asked, start, _ in self.requests if host == "storage" and asked == name]

    def handler(hub, host):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/api/models/"):
                    return self.list(path)
                name = path.split(COMMIT + "/")[1]
                resolving = "/resolve/" in path
                where = "resolve" if resolving else "cache" if host == "hub" else host
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                hub.requests.append((where, name, first, self.headers.get("Authorization")))
                if not resolving:
                    return self.send(name, first)
                if name in LARGE:
                    return self.answer(302, Location=f"{hub.address(1)}/{COMMIT}/{name}")
                return self.answer(307, Location=f"/api/resolve-cache/models/{REPO}/{COMMIT}/{name}")

            def list(self, path):
                if not path.startswith(f"/api/models/{REPO}/"):
                    return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
                if not path.endswith("/revision/main"):
                    return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
                info = {"id": REPO, "sha": COMMIT, "siblings": list(hub.listed.values())}
                return self.answer(200, json.dumps(info).encode(), **{"Content-Type": "application/json"})

            def send(self, name, first):
                if name in hub.down:
                    return self.answer(503)
                content = hub.files[name]
                ranged = "Range" in self.headers and not hub.ignores_ranges
                first = first if ranged else 0
                cuts = hub.cut_after.get(name, [])
                return self.answer(206 if ranged else 200, content[first:], cut=cuts.pop(0) if cuts else None)

            def answer(self, status, body=b"", cut=None, **headers):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

        return Handler


def listing(name, content):
    entry = {"rfilename": name, "size": len(content)}
    entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if name in LARGE:
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()
    yield hub
    hub.close()


def pull(hub, to, repo=REPO, revision="main"):
    main(to, repo=repo, revision=revision, endpoint=hub.address())


def refused(hub, to, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        pull(hub, to, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def wanted(hub):
    return {name: hub.files[name] for name in LARGE + SMALL}


def test_every_wanted_file_arrives_and_nothing_else(hub, tmp_path):
    pull(hub, tmp_path / "new" / "weights")
    assert contents(tmp_path / "new" / "weights") == wanted(hub)
    assert sorted(hub.fetched()) == sorted(LARGE + SMALL)


def test_a_second_run_fetches_nothing(hub, tmp_path):
    pull(hub, tmp_path)
    hub.requests.clear()
    pull(hub, tmp_path)
    assert hub.requests == []
    assert contents(tmp_path) == wanted(hub)


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [1_234_567, 1_000_000]
    pull(hub, tmp_path)
    assert hub.starts("dit.safetensors") == [0, 1_234_567, 2_234_567]
    assert contents(tmp_path) == wanted(hub)


def test_a_stopped_pull_keeps_its_bytes_and_the_same_command_goes_on(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    message = refused(hub, tmp_path)
    assert "dit.safetensors stopped at 2000000 of 3000001 bytes" in message
    assert "check the network connection and run the same command again, it goes on from there." in message
    assert not (tmp_path / "dit.safetensors").exists()
    hub.requests.clear()
    pull(hub, tmp_path)
    assert hub.starts("dit.safetensors") == [2_000_000]
    assert contents(tmp_path) == wanted(hub)


def test_a_file_that_the_hub_does_not_serve_is_one_line(hub, tmp_path):
    hub.down.add("encoder.safetensors")
    message = refused(hub, tmp_path)
    assert "encoder.safetensors stopped at 0 of 200000 bytes" in message and "503" in message


def test_a_partial_file_of_another_revision_is_not_continued(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    refused(hub, tmp_path)
    hub.files["dit.safetensors"] = bytes(reversed(hub.files["dit.safetensors"]))
    hub.listed["dit.safetensors"] = listing("dit.safetensors", hub.files["dit.safetensors"])
    hub.requests.clear()
    pull(hub, tmp_path)
    assert hub.starts("dit.safetensors") == [0]
    assert (tmp_path / "dit.safetensors").read_bytes() == hub.files["dit.safetensors"]


def test_a_server_that_ignores_ranges_starts_the_file_over(hub, tmp_path):
    hub.ignores_ranges = True
    hub.cut_after["dit.safetensors"] = [1_500_000]
    pull(hub, tmp_path)
    assert hub.starts("dit.safetensors") == [0, 1_500_000]
    assert contents(tmp_path) == wanted(hub)


@pytest.mark.parametrize("name", ["encoder.safetensors", "text_encoder/config.json"])
def test_a_corrupted_file_is_removed_and_both_hashes_named(hub, tmp_path, name):
    good = hub.files[name]
    hub.files[name] = good[:-1] + bytes([good[-1] ^ 1])
    hashes = [listing(name, content) for content in (good, hub.files[name])]
    message = refused(hub, tmp_path)
    for entry in hashes:
        assert (entry["lfs"]["sha256"] if name in LARGE else entry["blobId"]) in message
    assert name in message
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and name.rpartition("/")[2] in p.name]
    hub.files[name] = good
    pull(hub, tmp_path)
    assert contents(tmp_path) == wanted(hub)


def test_a_file_that_was_there_before_is_never_replaced(hub, tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(b"mine")
    message = refused(hub, tmp_path)
    assert "move or delete it" in message and hub.listed["dit.safetensors"]["lfs"]["sha256"] in message
    assert (tmp_path / "dit.safetensors").read_bytes() == b"mine"


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(hub, tmp_path)
    tokens = {host: {t for h, _, _, t in hub.requests if h == host} for host in ("resolve", "cache", "storage")}
    assert tokens == {"resolve": {"Bearer hf_secret"}, "cache": {"Bearer hf_secret"}, "storage": {None}}


def test_a_download_that_the_disk_cannot_hold_is_not_begun(hub, tmp_path):
    hub.listed["dit.safetensors"]["size"] = 10**18
    message = refused(hub, tmp_path)
    assert "931322574.6 GiB are to be fetched" in message and "free some space" in message
    assert hub.requests == []


def test_a_missing_repository_revision_or_file_is_named(hub, tmp_path):
    assert "no repo=someone/else" in refused(hub, tmp_path, repo="someone/else")
    assert "no revision=v9" in refused(hub, tmp_path, revision="v9")
    message = refused(hub, tmp_path, repo="not a repo")
    assert "repo=not a repo cannot be listed" in message and message.endswith(": name it OWNER/NAME.")
    del hub.listed["encoder.safetensors"]
    assert "has no encoder.safetensors" in refused(hub, tmp_path)
    assert hub.requests == [] and contents(tmp_path) == {}


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(CheckpointError) as caught:
            main(tmp_path, repo=REPO, revision="main", endpoint=endpoint)
    assert re.fullmatch(
        r"repo=someone/mochi cannot be listed \(.+\): check the network connection and run the same command again, "
        r"it goes on from what is there\.",
        str(caught.value),
    )


def test_a_target_that_is_a_file_is_refused(hub, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    assert "cannot be made a folder" in refused(hub, tmp_path / "taken")

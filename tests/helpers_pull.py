"""A hub on localhost for `weights pull`: it speaks the hub's few endpoints, and has faults to inject."""

import hashlib
import json
import random
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import pytest
from helpers_server import LocalServer

from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.weights.pull import PullSettings, main
from mochi_tune.weights.pull_record import RECORD
from mochi_tune.weights.sources import OFFICIAL_COMMIT

REPO = "someone/mochi"
COMMIT = "c" * 40
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in to the guest network.</body></html>"
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
        self.repos = {REPO: self.listed}
        self.commits = {"main": COMMIT, OFFICIAL_COMMIT: OFFICIAL_COMMIT}  # of each revision
        self.listings = []  # (repository, revision) asked for
        self.instead = {}  # name, or "listing" -> what is answered: status, body, headers
        self.servers = [LocalServer(self.handler(host)) for host in ("hub", "storage")]

    def close(self):
        for server in self.servers:
            server.close()

    def address(self, index=0):
        return self.servers[index].address

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
                if path == "/login":
                    return self.answer(200, PAGE, **{"Content-Type": "text/html; charset=utf-8"})
                if path.startswith("/api/models/"):
                    return self.list(path)
                name = re.split("/[0-9a-f]{40}/", path)[1]
                resolving = "/resolve/" in path
                where = "resolve" if resolving else "cache" if host == "hub" else host
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                hub.requests.append((where, name, first, self.headers.get("Authorization")))
                if not resolving:
                    return self.send(name, first)
                if name.endswith(".safetensors"):
                    return self.answer(302, Location=f"{hub.address(1)}/{COMMIT}/{name}")
                return self.answer(307, Location=f"/api/resolve-cache/models/{REPO}/{COMMIT}/{name}")

            def list(self, path):
                if "listing" in hub.instead:
                    status, body, headers = hub.instead["listing"]
                    return self.answer(status, body, **headers)
                repo, revision = path.removeprefix("/api/models/").split("/revision/")
                hub.listings.append((repo, revision))
                if repo not in hub.repos:
                    return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
                sha = hub.commits.get(revision, revision if re.fullmatch("[0-9a-f]{40}", revision) else None)
                if sha is None:
                    return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
                info = {"id": repo, "sha": sha, "siblings": list(hub.repos[repo].values())}
                return self.answer(200, json.dumps(info).encode(), **{"Content-Type": "application/json"})

            def send(self, name, first):
                if name in hub.down:
                    return self.answer(503)
                if name in hub.instead:
                    status, body, headers = hub.instead[name]
                    return self.answer(status, body, **headers)
                content = hub.files[name]
                ranged = "Range" in self.headers and not hub.ignores_ranges
                first = first if ranged else 0
                cut = (hub.cut_after.get(name) or [None]).pop(0)
                headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if ranged else {}
                return self.answer(206 if ranged else 200, content[first:], cut, **headers)

            def answer(self, status, body=b"", cut=None, **headers):
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    if value is not None:
                        self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[:cut])

        return Handler


def listing(name, content):
    entry = {"rfilename": name, "size": len(content)}
    entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if name.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serving(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


def pull(hub, to, repo=REPO, revision=None, **settings):
    return main(to, PullSettings(repo=repo, revision=revision, endpoint=hub.address(), **settings))


def refused(hub, to, **kwargs):
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        pull(hub, to, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    """Returns every file's bytes, but for pulled.json."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop(RECORD, None)
    return files


def wanted(hub):
    return {name: hub.files[name] for name in LARGE + SMALL}

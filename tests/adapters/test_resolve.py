"""Adapters in a folder or in a repository on the hub, for which a server on localhost answers."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers_hub import silent_hub
from helpers_server import LocalServer
from safetensors.torch import save

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.resolve import find_adapter_file
from mochi_tune.errors import CheckpointError

COMMIT = "c" * 40
NAME = "transformer.transformer_blocks.0.attn1.to_out.0.lora"
WEIGHTS = save({f"{NAME}_A.weight": torch.ones(2, 192), f"{NAME}_B.weight": torch.ones(192, 2)})
CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}).encode()
REPOS = {
    "someone/one": {"pytorch_lora_weights.safetensors": WEIGHTS, "README.md": b"x", "video.mp4": b"large"},
    "someone/peft": {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": CONFIG, "other.bin": b"x"},
    "someone/many": {
        "step_100.safetensors": WEIGHTS, "step_200.safetensors": WEIGHTS, "peft/adapter_model.safetensors": WEIGHTS,
        "peft/adapter_config.json": CONFIG,
    },
    "someone/none": {"README.md": b"x"},
    "someone/parts": {"adapter_model-00001-of-00002.safetensors": WEIGHTS},
    "someone/cog": {"pytorch_lora_weights.safetensors": WEIGHTS},
}  # fmt: skip


class Hub(LocalServer):
    def __init__(self):
        self.fetched, self.commit = [], COMMIT
        # Other answers, by endpoint: "resolve" for files, "revision" for their list.
        self.failures = {}
        super().__init__(self.handler())

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = unquote(urlsplit(self.path).path).removeprefix("/api/models").strip("/")
                repo = "/".join(path.split("/")[:2])
                rest = path.removeprefix(repo).strip("/")
                if repo not in REPOS:
                    return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
                kind, _, inner = rest.partition("/")
                revision, _, file = inner.partition("/")
                if kind in hub.failures:
                    return self.answer(*hub.failures[kind])
                if revision not in ("main", "v1", COMMIT):
                    return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
                if kind == "resolve":
                    if file not in REPOS[repo]:
                        return self.answer(404, **{"X-Error-Code": "EntryNotFound"})
                    content = REPOS[repo][file]
                    hub.fetched += [file] if self.command == "GET" else []
                    etag = hashlib.sha256(content).hexdigest()
                    return self.answer(200, content, **{"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})
                listed = {"id": repo, "sha": hub.commit, "siblings": [{"rfilename": name} for name in REPOS[repo]]}
                listed["tags"] = ["lora", "base_model:THUDM/CogVideoX-5b"] if repo == "someone/cog" else ["lora"]
                return self.answer(200, json.dumps(listed).encode())

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        return Handler


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()
    # The value of HF_HUB_CACHE, which the library reads when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    yield hub
    hub.close()


def refused(name, hub=None):
    with pytest.raises(CheckpointError) as error:
        load_adapter(find_adapter_file(name, hub and hub.address))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "files", "alpha"),
    [
        ("someone/one", ["pytorch_lora_weights.safetensors"], 2),
        ("someone/peft", ["adapter_config.json", "adapter_model.safetensors"], 6),
        ("someone/many/step_200.safetensors", ["step_200.safetensors"], 2),
        ("someone/many/peft", ["peft/adapter_config.json", "peft/adapter_model.safetensors"], 6),
        ("someone/many/step_100.safetensors@v1", ["step_100.safetensors"], 2),
        (f"someone/one@{COMMIT}", ["pytorch_lora_weights.safetensors"], 2),
    ],
)
def test_the_adapter_and_the_config_beside_it_are_fetched_once_and_work_offline(hub, monkeypatch, name, files, alpha):
    file = find_adapter_file(f"hub:{name}", hub.address)
    adapter = load_adapter(file)
    assert adapter.layers["blocks.0.attn.proj_x"].alpha == alpha
    assert hub.fetched == files and COMMIT in str(file)
    assert find_adapter_file(f"hub:{name}", hub.address) == file and hub.fetched == files
    hub.close()
    monkeypatch.setattr(hub, "close", lambda: None)
    assert find_adapter_file(f"hub:{name}", hub.address) == file
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_adapter(f"hub:{name}").layers["blocks.0.attn.proj_x"].alpha == alpha


def test_what_the_hub_lacks_is_reported_in_one_line(hub, monkeypatch):
    assert "no such repository" in refused("hub:someone/nowhere", hub)
    assert "no such repository, revision" in refused("hub:someone/one@v9", hub)
    assert "has no x.safetensors, it has pytorch_lora_weights.safetensors: name one that it has" in refused(
        "hub:someone/one/x.safetensors", hub
    )
    assert "has several .safetensors files, step_100.safetensors, step_200.safetensors: name the one" in refused(
        "hub:someone/many", hub
    )
    assert "has no .safetensors file" in refused("hub:someone/none", hub)
    assert "has no .safetensors file" in refused("hub:someone/one/folder", hub)
    assert "is one of CogVideoX, its page on the hub, of THUDM/CogVideoX-5b, says CogVideoX-5b: use" in refused(
        "hub:someone/cog", hub
    )
    for name in ("hub:", "hub:one", "hub:someone/one@", "hub:some one/x"):
        assert "use hub:OWNER/NAME" in refused(name, hub)
    assert hub.fetched == []
    hub.close()
    monkeypatch.setattr(hub, "close", lambda: None)
    assert "the hub cannot be reached" in refused("hub:someone/one", hub)
    assert "its cache has no such repository" in refused("hub:someone/one", hub)


def test_a_hub_that_never_answers_counts_as_not_reached(hub, monkeypatch):
    monkeypatch.setattr("mochi_tune.adapters.resolve.TIMEOUT_SECONDS", 0.2)
    cached = find_adapter_file("hub:someone/one", hub.address)
    with silent_hub() as address:
        assert find_adapter_file("hub:someone/one", address) == cached
        with pytest.raises(CheckpointError, match=r"the hub cannot be reached \(.*timed out.*its cache has no such"):
            find_adapter_file("hub:someone/peft", address)


@pytest.mark.parametrize("answer", [(500,), (503,), (429,), (200, b"<html>Log in</html>")])
def test_a_hub_that_fails_gives_a_notice_with_the_cached_commit(hub, capsys, answer):
    cached = find_adapter_file("hub:someone/peft", hub.address)
    hub.commit, hub.failures = "d" * 40, {"revision": answer}
    assert find_adapter_file("hub:someone/peft", hub.address) == cached
    [line] = capsys.readouterr().err.splitlines()
    assert "adapter hub:someone/peft: the hub cannot be reached (" in line
    assert line.endswith("): the cached commit cccccccccccc is used")
    assert f"{answer[0]}" in line or "what a login page or a proxy may send" in line
    missing = refused("hub:someone/peft/other.safetensors", hub)
    assert "the hub cannot be reached (" in missing
    assert "and its cache has no other.safetensors, it has adapter_model.safetensors: name one" in missing
    # A commit cannot change, so there is no notice.
    find_adapter_file(f"hub:someone/peft@{COMMIT}", hub.address)
    assert not capsys.readouterr().err


def test_a_hub_that_lists_a_new_commit_but_does_not_send_it_gives_a_notice(hub, capsys):
    cached = find_adapter_file("hub:someone/one", hub.address)
    hub.commit, hub.failures = "d" * 40, {"resolve": (500,)}
    assert find_adapter_file("hub:someone/one", hub.address) == cached
    [line] = capsys.readouterr().err.splitlines()
    assert "the hub has the commit dddddddddddd but does not send its files now: the cached commit cccc" in line


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_not_answered_from_the_cache(hub, status):
    find_adapter_file("hub:someone/one", hub.address)
    hub.failures = {"revision": (status,)}
    assert "log in with `hf auth login`" in refused("hub:someone/one", hub)


def test_a_config_that_the_cache_may_lack_gives_a_notice(hub, capsys):
    from huggingface_hub import hf_hub_download

    hf_hub_download("someone/peft", "adapter_model.safetensors", endpoint=hub.address)
    hub.failures = {"revision": (503,)}
    assert load_adapter(find_adapter_file("hub:someone/peft", hub.address)).layers["blocks.0.attn.proj_x"].alpha == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is used without adapter_config.json, which would state its alpha if the hub has one" in line


def test_a_folder(tmp_path):
    assert "has no .safetensors file: name one" in refused(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert "no .safetensors file but adapter_model.bin, and pickles can run code" in refused(tmp_path)
    for name in ("b.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(WEIGHTS)
    assert find_adapter_file(tmp_path).name == "b.safetensors"
    (tmp_path / "a.safetensors").write_bytes(WEIGHTS)
    assert "several .safetensors files, a.safetensors, b.safetensors: name the one of the adapter" in refused(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(WEIGHTS)
    assert find_adapter_file(tmp_path).name == "adapter.safetensors"
    # In a checkpoint with an EMA it could be the other file.
    (tmp_path / "averaged.safetensors").write_bytes(WEIGHTS)
    assert "several adapters, adapter.safetensors, averaged.safetensors" in refused(tmp_path)
    assert find_adapter_file(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_a_part_of_an_adapter_is_not_taken_for_the_whole(tmp_path, hub):
    part = tmp_path / "adapter_model-00001-of-00002.safetensors"
    part.write_bytes(WEIGHTS)
    advice = "one of 2 parts of an adapter: join the parts into one .safetensors file"
    assert advice in refused(part) and f"has {part.name}, which is {advice}" in refused(tmp_path)
    assert "is the index of an adapter in parts: join" in refused(tmp_path / "adapter_model.safetensors.index.json")
    assert advice in refused(f"hub:someone/parts/{part.name}", hub) and not hub.fetched
    # A single part is the whole.
    whole = part.rename(tmp_path / "adapter_model-00001-of-00001.safetensors")
    assert load_adapter(tmp_path).path == whole

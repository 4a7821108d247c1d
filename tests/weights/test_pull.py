"""`weights pull` against a real HTTP server on localhost that speaks the hub's few endpoints."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.weights.pull import PullSettings, main
from mochi_tune.weights.pull_record import RECORD
from mochi_tune.weights.sources import OFFICIAL_COMMIT, OFFICIAL_REPO

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


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()
    yield hub
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
            main(tmp_path, PullSettings(repo=REPO, endpoint=endpoint))
    assert re.fullmatch(
        r"repo=someone/mochi cannot be listed \(.+\): check the network connection and run the same command again, "
        r"it goes on from what is there\.",
        str(caught.value),
    )


def test_a_target_that_is_a_file_is_refused(hub, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    assert "cannot be made a folder" in refused(hub, tmp_path / "taken")


def add_repo(hub, repo, *names):
    """Puts another repository on the hub; returns its files' bytes."""
    files = {name: random.Random(name).randbytes(900) for name in names}
    hub.files |= files
    hub.repos[repo] = {name: listing(name, content) for name, content in files.items()}
    return files


DIFFUSERS = (
    "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.bf16-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors",
    "vae/modeling_vae.py", "text_encoder/pytorch_model.bin", "dit.safetensors",
    "text_encoder/config.json", "text_encoder/model-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.json", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize(("precision", "absent"), [("bf16", ""), ("fp32", ""), ("bf16", ".bf16-00002")])
def test_of_diffusers_models_one_variant_arrives(hub, tmp_path, precision, absent):
    names = [name for name in DIFFUSERS if not absent or absent not in name]
    files = add_repo(hub, "someone/theirs", *names)
    pull(hub, tmp_path, repo="someone/theirs", source="diffusers", precision=precision)
    taken = {name: ("bf16" if "bf16" in name else "plain") for name in contents(tmp_path) if "diffusion_py" in name}
    variant = "bf16" if precision == "bf16" else "plain"
    # A variant that lacks a shard is not taken.
    of_dit = "plain" if absent else variant
    assert sorted(taken) == sorted(
        name
        for name in names
        if "diffusion_py" in name
        and ("bf16" in name) == ((of_dit if name.startswith("transformer") else variant) == "bf16")
    )
    rest = contents(tmp_path).keys() - taken.keys()
    assert rest == {
        "transformer/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/spiece.model",
        "text_encoder/model-00001-of-00001.safetensors", "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    assert contents(tmp_path) == {name: files[name] for name in contents(tmp_path)}


COMFYUI = (
    "diffusion_models/mochi_preview_bf16.safetensors", "diffusion_models/mochi_preview_fp8_scaled.safetensors",
    "vae/mochi_vae.safetensors", "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_of_comfyuis_files_one_precision_arrives_with_the_official_tokenizer(hub, tmp_path, precision):
    files = add_repo(hub, "someone/comfy", "all_in_one/x.safetensors", *(f"split_files/{name}" for name in COMFYUI))
    add_repo(hub, OFFICIAL_REPO, "dit.safetensors", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json")
    pull(hub, tmp_path, repo="someone/comfy", source="comfyui", precision=precision)
    arrived = contents(tmp_path)
    expected = {n for n in COMFYUI if ("fp8" in n) == (precision == "fp8") or n.startswith("vae")}
    assert arrived.keys() == expected | {"tokenizer/spiece.model", "tokenizer/tokenizer_config.json"}
    assert all(arrived[name] == files[f"split_files/{name}"] for name in expected)
    assert hub.listings == [("someone/comfy", "main"), (OFFICIAL_REPO, OFFICIAL_COMMIT)]
    assert pull(hub, tmp_path, repo="someone/comfy", source="comfyui", precision=precision) == []


def test_an_unknown_source_or_precision_is_one_line(tmp_path):
    for settings, text in [
        ({"source": "comfyiu"}, "source=comfyiu is not known: did you mean comfyui?"),
        ({"source": "x"}, "source=x is not known: use official, diffusers, comfyui."),
        ({"precision": "fp8"}, "source=official has no precision=fp8: use precision=published, or source=comfyui."),
        ({"source": "comfyui", "precision": "int4"}, "no precision=int4: use precision=bf16 or fp8."),
    ]:
        with pytest.raises(ConfigError, match=re.escape(text)):
            main(tmp_path, PullSettings(**settings))


def test_what_was_pulled_is_recorded_and_pins_the_folder(hub, tmp_path):
    pull(hub, tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    [repository] = record["repositories"]
    assert (repository["repo"], repository["commit"], record["source"]) == (REPO, COMMIT, "official")
    assert repository["files"].keys() == contents(tmp_path).keys()
    for name, content in contents(tmp_path).items():
        entry, said = hub.listed[name], repository["files"][name]
        kept = {"sha256": entry["lfs"]["sha256"]} if "lfs" in entry else {"git_blob": entry["blobId"]}
        assert said == {"bytes": len(content), **kept}
    # The branch moves on: the folder does not.
    hub.commits["main"] = "d" * 40
    hub.listings.clear()
    assert pull(hub, tmp_path) == []
    assert hub.listings == [(REPO, COMMIT)]


def test_another_commit_is_taken_where_it_has_the_same_files_and_refused_where_not(hub, tmp_path):
    pull(hub, tmp_path)
    hub.commits["main"] = "d" * 40
    pull(hub, tmp_path, revision="main")
    assert json.loads((tmp_path / RECORD).read_text())["repositories"][0]["commit"] == "d" * 40
    changed = hub.files["decoder.safetensors"][::-1]
    hub.listed["decoder.safetensors"] = listing("decoder.safetensors", changed)
    hub.commits["main"] = "e" * 40
    before, kept = contents(tmp_path), (tmp_path / RECORD).read_bytes()
    message = refused(hub, tmp_path, revision="main")
    assert f"holds commit {'d' * 40} of {REPO}, and revision=main is commit {'e' * 40}, in which decoder" in message
    assert contents(tmp_path) == before and (tmp_path / RECORD).read_bytes() == kept


def test_a_stopped_pull_goes_on_with_its_commit_though_the_branch_moved(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    refused(hub, tmp_path)
    hub.commits["main"] = "d" * 40
    pull(hub, tmp_path)
    assert hub.listings[-1] == (REPO, COMMIT) and hub.starts("dit.safetensors")[-1] == 2_000_000
    assert contents(tmp_path) == wanted(hub)


def test_a_folder_of_another_source_is_not_mixed(hub, tmp_path):
    pull(hub, tmp_path)
    for settings in ({"source": "diffusers"}, {"repo": "someone/else"}):
        assert "set to=DIR to another folder" in refused(hub, tmp_path, **settings)
    assert contents(tmp_path) == wanted(hub)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("source"),
        lambda value: value.update(repositories=[]),
        lambda value: value["repositories"][0].update(commit=3),
        lambda value: value["repositories"][0]["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
        lambda value: value["repositories"][0]["files"].update({"x": {"bytes": 1, "sha256": "0" * 63}}),
    ],
)
def test_a_damaged_record_is_one_line(hub, tmp_path, change):
    pull(hub, tmp_path)
    value = json.loads((tmp_path / RECORD).read_text())
    change(value)
    (tmp_path / RECORD).write_text(json.dumps(value))
    assert "pulled.json is damaged" in refused(hub, tmp_path)


def test_without_a_network_the_folder_is_checked_by_its_record(hub, tmp_path):
    pull(hub, tmp_path)
    hub.instead["listing"] = (503, b"", {})
    [note] = pull(hub, tmp_path)
    assert re.fullmatch(r"offline \(.*503.*\): all 7 files are as when they were pulled", note)
    # It does not stand for what was not pulled.
    assert "cannot be listed" in refused(hub, tmp_path, revision="v2")
    changed = tmp_path / "encoder.safetensors"
    changed.write_bytes(changed.read_bytes()[::-1])
    assert "encoder.safetensors is not the file that was asked for" in refused(hub, tmp_path)
    changed.unlink()
    assert "lacks encoder.safetensors, and the hub cannot be asked" in refused(hub, tmp_path)


def test_the_command_line_offline_and_a_dry_run(hub, tmp_path):
    folder = tmp_path / "weights"
    command = [sys.executable, "-m", "mochi_tune.cli", "weights", "pull", f"to={folder}", f"repo={REPO}"]

    def run(*more, **environment):
        env = os.environ | environment
        return subprocess.run([*command, *more], capture_output=True, text=True, env=env)

    endpoint = f"endpoint={hub.address()}"
    done = run(endpoint, "dry_run=true")
    assert done.returncode == 0 and not folder.exists(), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{REPO}, commit {COMMIT}" and len(lines) == 9
    assert lines[1] == "    0.003 GiB  to fetch  dit.safetensors"
    assert re.fullmatch(r"    0\.003 GiB in all, 0\.003 GiB to fetch, [\d.]+ GiB free", lines[-1])
    done = run(HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"repo={REPO} cannot be listed (HF_HUB_OFFLINE is set): unset it for the first pull" in done.stderr
    pull(hub, folder)
    hub.listings.clear()
    done = run(endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout == f"{folder}\n", done.stderr
    assert "mochi-tune: offline (HF_HUB_OFFLINE is set): all 7 files are as when they were pulled" in done.stderr
    assert hub.listings == []


HTML = {"Content-Type": "text/html; charset=utf-8"}
JSON = {"Content-Type": "application/json"}
WRONG_ANSWERS = {
    "login page": (200, PAGE, HTML),
    "login page without its type": (200, PAGE, {"Content-Length": None}),
    "login page as a part": (206, PAGE, {}),
    "redirect to a login": (302, b"", {"Location": "/login"}),
    "unauthorized": (401, b"", {}),
    "forbidden": (403, PAGE, HTML),
    "another size": (200, b"short", {}),
    "nothing": (204, b"", {}),
    "too long": (200, bytes(4_000_000), {"Content-Length": None}),
    "another part": (206, b"short", {"Content-Range": "bytes 7-11/3000001"}),
    "a part of another file": (206, b"short", {"Content-Range": "bytes 0-4/5"}),
}
SAID = {
    "unauthorized": "answers with 401", "forbidden": "answers with 403", "another size": "answers with 5 bytes",
    "nothing": "bytes, where it has", "too long": "answers with more than its", "another part": "another part",
    "a part of another file": "another part",
}  # fmt: skip


@pytest.mark.parametrize("name", ["dit.safetensors", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_is_sent_in_place_of_a_file_is_never_kept(hub, tmp_path, name, kind):
    hub.instead[name] = WRONG_ANSWERS[kind]
    message = refused(hub, tmp_path)
    assert name in message and SAID.get(kind, "a web page") in message and "run the same command again" in message
    left = [p.name for p in (tmp_path / name).parent.iterdir() if (tmp_path / name).name in p.name]
    assert left == []
    del hub.instead[name]
    pull(hub, tmp_path)
    assert contents(tmp_path) == wanted(hub)


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_was_fetched_before_a_wrong_answer_is_kept(hub, tmp_path, kind):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    refused(hub, tmp_path)
    hub.instead["dit.safetensors"] = WRONG_ANSWERS[kind]
    refused(hub, tmp_path)
    del hub.instead["dit.safetensors"]
    hub.requests.clear()
    pull(hub, tmp_path)
    if kind != "too long":
        assert hub.starts("dit.safetensors") == [2_000_000]
    assert contents(tmp_path) == wanted(hub)


def test_a_proxy_that_always_cuts_ends_in_one_line_and_the_next_run_goes_on(hub, tmp_path):
    hub.ignores_ranges = True
    hub.cut_after["dit.safetensors"] = [1_500_000] * 3
    assert "dit.safetensors stopped at 1500000 of 3000001 bytes" in refused(hub, tmp_path)
    assert not (tmp_path / "dit.safetensors").exists()
    hub.ignores_ranges = False
    hub.cut_after.clear()
    pull(hub, tmp_path)
    assert contents(tmp_path) == wanted(hub)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((200, PAGE, HTML), "the answer is not the hub's, but what a login page or a proxy may send"),
        ((200, b'{"login": "https://example.com"}', JSON), "the answer is not the hub's"),
        ((200, b"[]", JSON), "the answer is not the hub's"),
        ((302, b"", {"Location": "/login"}), "cannot be listed"),
        ((401, b"", {}), "log in with `hf auth login`, or check the proxy and run the same command again"),
        ((403, b"", {}), "log in with `hf auth login`"),
        ((511, PAGE, HTML), "cannot be listed"),
    ],
)
def test_a_listing_that_is_not_the_hubs_is_one_line(hub, tmp_path, answer, text):
    hub.instead["listing"] = answer
    assert text in refused(hub, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change", [{"size": None}, {"size": -1}, {"lfs": {"sha256": "../../x", "size": 1, "pointerSize": 1}}]
)
def test_a_listing_without_sizes_and_hashes_is_one_line(hub, tmp_path, change):
    hub.listed["dit.safetensors"] |= {"blobId": None} | change
    assert "gives no size and hash of someone/mochi's dit.safetensors" in refused(hub, tmp_path)

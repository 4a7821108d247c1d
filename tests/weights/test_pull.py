"""`weights pull` from a real HTTP server on localhost: downloads, interruptions and wrong answers."""

import errno
import fcntl
import re
import socket

import pytest
from helpers_pull import LARGE, PAGE, REPO, SMALL, contents, listing, pull, refused, serving, wanted

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.pull import PullSettings, main, only_process


@pytest.fixture
def hub(monkeypatch):
    with serving(monkeypatch) as hub:
        yield hub


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


def test_a_broken_connection_is_resumed(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [1_234_567, 1_000_000]
    pull(hub, tmp_path)
    assert hub.starts("dit.safetensors") == [0, 1_234_567, 2_234_567]
    assert contents(tmp_path) == wanted(hub)


def test_a_stopped_pull_keeps_its_bytes_and_the_same_command_goes_on(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    message = refused(hub, tmp_path)
    assert "dit.safetensors stopped at 2000000 of 3000001 bytes" in message
    assert "check the network connection and run the same command again, it continues the download." in message
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
    assert "931322574.6 GiB are left to download" in message and "free some space" in message
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
        r"it continues the download\.",
        str(caught.value),
    )


def test_a_target_that_is_a_file_is_refused(hub, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    assert "the folder cannot be made" in refused(hub, tmp_path / "taken")


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
    assert "states no size and hash of someone/mochi's dit.safetensors" in refused(hub, tmp_path)


def test_a_second_pull_into_a_folder_is_refused(hub, tmp_path):
    """Both would append to the same files."""
    to = tmp_path / "weights"
    to.mkdir()
    with only_process(to):
        with pytest.raises(CheckpointError, match=r"another `weights pull` into .* is running: wait until it ends"):
            pull(hub, to)
        assert [path.name for path in to.iterdir()] == [".pull.lock"]
    assert not list(to.iterdir())


def test_a_disk_without_locks_takes_weights(hub, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    pull(hub, tmp_path)
    assert contents(tmp_path) == wanted(hub)

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_cache import BUCKETS, SETTINGS, encode, make_cache, row_of, rows_of, tensors_of
from safetensors.torch import save_file

from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import open_cache
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256

CAPTIONS = {f"clip{i}.mp4": f"caption number {i} " + "x " * i for i in range(7)} | {"sub/empty.mp4": ""}
# Two rows (4608 bytes of latents each) fit into a shard of this size, three do not.
SMALL = 11_000


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    return {
        str(file.relative_to(folder)): (file_sha256(file), file.stat().st_mtime_ns, file.stat().st_ino)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def damaged_shards(folder: Path) -> list[str]:
    """Returns the shards whose bytes differ from those that were committed."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert shards
    return [s["file"] for s in shards if hashlib.sha256((folder / s["file"]).read_bytes()).hexdigest() != s["sha256"]]


def assert_holds(folder, rows):
    cache = open_cache(folder, BUCKETS)
    assert cache.rows == sorted(rows, key=lambda row: row.path)
    for index, row in enumerate(cache.rows):
        found, expected = cache.read(index), tensors_of(row)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], tensor), (row.path, name)
    return cache


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    rows, counts = make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    assert counts == (8, 8)
    cache = assert_holds(tmp_path, rows)
    assert cache.settings == SETTINGS
    names = sorted(file.name for file in (tmp_path / "data").iterdir())
    assert len(names) > 2
    assert names == [f"train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "data", "manifest.json"]
    assert damaged_shards(tmp_path) == []


def test_load_dataset_reads_it_as_it_is(tmp_path):
    import datasets

    rows, _ = make_cache(tmp_path / "cache", CAPTIONS, shard_bytes=SMALL)
    (tmp_path / "cache" / "report.csv").write_text("clip,status\n")
    table = datasets.load_dataset(str(tmp_path / "cache"), cache_dir=str(tmp_path / "hf"))
    assert list(table) == ["train"]
    table = table["train"].with_format("torch")
    assert len(table) == 8
    by_path = {row.path: row for row in rows}
    assert {record["path"] for record in table} == set(by_path)
    for record in table:
        row = by_path[record["path"]]
        expected = tensors_of(row)
        assert (record["captions"], record["clip_key"]) == (list(row.captions), row.clip_key)
        for name in ("mean", "logvar"):
            assert torch.equal(record[name].view(record["latent_shape"].tolist()), expected[name])
        assert record["num_tokens"].tolist() == [len(expected["prompt_embeds"])]
        assert record["caption_tokens"].tolist() == [len(row.captions[0].split()) + 1]
        assert json.loads(record["clip_report"]) == {"scale": 0.5, "name": row.path}
        # An empty list is read as an empty tensor of any dtype.
        embeds = torch.as_tensor(record["prompt_embeds"]).float().view(-1, int(record["text_width"]))
        assert torch.equal(embeds, expected["prompt_embeds"])


def test_a_second_run_encodes_and_writes_nothing(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    before = state(tmp_path)
    rows = rows_of(CAPTIONS)
    with CacheWriter(tmp_path) as writer:
        assert encode(writer, rows) == (0, 0)
        assert writer.commit(rows, SETTINGS, SMALL) is False
    assert state(tmp_path) == before


def test_a_changed_caption_encodes_that_caption_alone_and_rewrites_its_shard_alone(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    before = state(tmp_path)
    rows, counts = make_cache(tmp_path, CAPTIONS | {"clip3.mp4": "something else"}, shard_bytes=SMALL)
    assert counts == (0, 1)
    assert_holds(tmp_path, rows)
    inodes = {inode for _, _, inode in before.values()}
    shards = [value for name, value in state(tmp_path).items() if name.startswith("data/")]
    assert sum(inode not in inodes for _, _, inode in shards) == 1
    assert len(shards) == sum(name.startswith("data/") for name in before)


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    before = state(tmp_path)

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    rows, counts = make_cache(tmp_path, CAPTIONS | {"clip3.mp4": "something else"}, shard_bytes=SMALL)
    assert counts == (0, 1)
    assert_holds(tmp_path, rows)
    assert damaged_shards(tmp_path) == []
    kept = {sha256 for sha256, _, _ in before.values()} & {sha256 for sha256, _, _ in state(tmp_path).values()}
    assert len(kept) == len(list((tmp_path / "data").iterdir())) - 1


def test_a_changed_video_encodes_that_video_alone(tmp_path):
    make_cache(tmp_path, CAPTIONS)
    rows = rows_of(CAPTIONS)
    rows[2] = row_of(rows[2].path, rows[2].captions, "other bytes")
    with CacheWriter(tmp_path) as writer:
        assert encode(writer, rows) == (1, 0)
        writer.commit(rows, SETTINGS)
    assert_holds(tmp_path, rows)


def test_removed_renamed_and_added_clips(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    fewer = {path: caption for path, caption in CAPTIONS.items() if path != "clip1.mp4"}
    rows, counts = make_cache(tmp_path, fewer, shard_bytes=SMALL)
    assert counts == (0, 0)
    assert_holds(tmp_path, rows)
    rows, counts = make_cache(tmp_path, fewer | {"new.mp4": "a new one"}, shard_bytes=SMALL)
    assert counts == (1, 1)
    assert_holds(tmp_path, rows)
    moved = [dataclasses.replace(row, path="moved/" + row.path, sample_id="moved/" + row.path) for row in rows]
    with CacheWriter(tmp_path) as writer:
        assert encode(writer, moved) == (0, 0)
        assert writer.commit(moved, SETTINGS) is True
    assert [row.path for row in open_cache(tmp_path, BUCKETS).rows] == sorted(row.path for row in moved)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transform": SETTINGS.transform | {"version": 2}}, (8, 0)),
        ({"vae": "w" * 64}, (8, 0)),
        ({"vae_dtype": "bf16"}, (8, 0)),
        ({"t5": "u" * 64}, (0, 8)),
        ({"t5_dtype": "bf16"}, (0, 8)),
    ],
)
def test_changed_settings_encode_only_what_they_touch(tmp_path, change, expected):
    make_cache(tmp_path, CAPTIONS)
    settings = dataclasses.replace(SETTINGS, **change)
    rows, counts = make_cache(tmp_path, CAPTIONS, settings)
    assert counts == expected
    assert assert_holds(tmp_path, rows).settings == settings


def test_equal_captions_and_equal_videos_are_encoded_once(tmp_path):
    rows = [row_of(f"{i}.mp4", "the same words", f"sha{i // 2}") for i in range(4)]
    with CacheWriter(tmp_path) as writer:
        assert encode(writer, rows) == (2, 1)
        writer.commit(rows, SETTINGS)
    assert_holds(tmp_path, rows)


def test_added_clips_do_not_pile_up_small_shards(tmp_path):
    for count in range(1, 8):
        captions = dict(list(CAPTIONS.items())[:count])
        make_cache(tmp_path, captions)
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_the_order_of_clips_does_not_depend_on_the_history_of_the_cache(tmp_path):
    make_cache(tmp_path / "straight", CAPTIONS, shard_bytes=SMALL)
    make_cache(tmp_path / "grown", dict(list(CAPTIONS.items())[4:]), shard_bytes=SMALL)
    make_cache(tmp_path / "grown", CAPTIONS, shard_bytes=SMALL)
    straight, grown = (open_cache(tmp_path / name, BUCKETS) for name in ("straight", "grown"))
    assert straight.rows == grown.rows
    assert straight.fingerprint == grown.fingerprint
    make_cache(tmp_path / "grown", CAPTIONS | {"clip0.mp4": "changed"}, shard_bytes=SMALL)
    assert open_cache(tmp_path / "grown", BUCKETS).fingerprint != straight.fingerprint


def test_training_refuses_a_cache_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"there is no cache in .*nothing: run `mochi-tune prepare` first\.$"):
        open_cache(tmp_path / "nothing", BUCKETS)


def test_training_refuses_an_incomplete_cache_and_names_the_files(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    shards = sorted((tmp_path / "data").iterdir())
    shards[0].unlink()
    size = shards[1].stat().st_size
    with shards[1].open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path, BUCKETS)
    assert f"data/{shards[0].name} is missing" in str(caught.value)
    assert f"data/{shards[1].name} has {size - 1} of {size} bytes" in str(caught.value)
    assert "prepare" in str(caught.value) and "\n" not in str(caught.value)


def test_training_refuses_a_cache_without_a_whole_manifest(tmp_path):
    make_cache(tmp_path, CAPTIONS)
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_text()
    for damaged in (whole[: len(whole) // 2], whole.replace('"complete": true', '"complete": false'), "[]"):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match="incomplete"):
            open_cache(tmp_path, BUCKETS)
    manifest.unlink()
    with pytest.raises(DataError, match="incomplete"):
        open_cache(tmp_path, BUCKETS)
    manifest.write_text(whole.replace('"schema_version": 3', '"schema_version": 999'))
    with pytest.raises(DataError, match=r"written by another version.*layout 999, this one reads 3\)"):
        open_cache(tmp_path, BUCKETS)


def test_training_refuses_a_cache_whose_prepare_was_stopped(tmp_path):
    make_cache(tmp_path, CAPTIONS)
    with CacheWriter(tmp_path) as writer:
        encode(writer, rows_of({"more.mp4": "one more"}))
    with pytest.raises(DataError, match="stopped before its end"):
        open_cache(tmp_path, BUCKETS)


def test_training_refuses_a_cache_made_for_other_settings_and_says_which(tmp_path):
    make_cache(tmp_path, CAPTIONS)
    open_cache(tmp_path, BUCKETS, vae_fingerprint="v" * 64, t5_fingerprint="t" * 64)
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path, {"": [Bucket(13, 32, 64)]})
    assert "num_frames: the cache has 7, the config wants 13" in str(caught.value)
    assert "width: the cache has 48, the config wants 64" in str(caught.value)
    assert "height" not in str(caught.value) and "layout" not in str(caught.value)
    for name in ("vae", "t5"):
        with pytest.raises(DataError) as caught:
            open_cache(tmp_path, BUCKETS, **{f"{name}_fingerprint": "f" * 64})
        assert (
            f"({name} weights: the cache has {SETTINGS.vae[:12] if name == 'vae' else SETTINGS.t5[:12]}, the config "
            "wants ffffffffffff: other weights, or the same in another file layout)"
        ) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_found_and_only_its_rows_are_encoded_again(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    shard = sorted((tmp_path / "data").iterdir())[1]
    num_rows = len(json.loads((tmp_path / "manifest.json").read_text())["shards"][1]["rows"])
    with shard.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 255]))
    assert damaged_shards(tmp_path) == [f"data/{shard.name}"]
    rows, counts = make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    assert counts == (num_rows, num_rows)
    assert_holds(tmp_path, rows)
    assert damaged_shards(tmp_path) == []


def test_a_damaged_part_is_named(tmp_path):
    with CacheWriter(tmp_path) as writer:
        encode(writer, rows_of({"a.mp4": "some words"}))
    part = next((tmp_path / "parts").glob("latents-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{part.name} is damaged .*delete it"), CacheWriter(tmp_path):
        pass
    # A file of another program, without our metadata.
    save_file({"mean": torch.zeros(1)}, part)
    with pytest.raises(DataError, match=f"{part.name} is damaged .*delete it"), CacheWriter(tmp_path):
        pass


def test_two_writers_are_refused_at_once_but_not_in_turn(tmp_path):
    refused = pytest.raises(DataError, match="another `mochi-tune prepare`")
    with CacheWriter(tmp_path), refused, CacheWriter(tmp_path):
        pass
    with CacheWriter(tmp_path):
        pass


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="is a file"), CacheWriter(tmp_path / "cache"):
        pass


CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from helpers_cache import SETTINGS, encode, rows_of
from mochi_tune.data.cache_writer import CacheWriter

rows, base = rows_of({captions!r}), Path({base!r})

def die_slowly(folder):
    with CacheWriter(folder) as writer:
        for row in rows:
            encode(writer, [row])
            print("encoded", flush=True)
            sys.stdin.readline()

def die_at(folder, step):
    # Dies by SIGKILL just before the commit's call number `step` that makes, renames, links or removes something.
    writer = CacheWriter(folder).__enter__()
    encode(writer, rows)
    calls = 0
    def count(event, arguments):
        nonlocal calls
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"):
            calls += 1
            if calls > step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    writer.commit(rows, SETTINGS, {small})
    os._exit(0)

def die_everywhere():
    for step in range(1000):
        folder = base.with_name(f"killed{{step}}")
        shutil.copytree(base, folder)
        pid = os.fork()
        if pid == 0:
            die_at(folder, step)
        if os.waitpid(pid, 0)[1] == 0:
            break

{call}
"""


def start_child(call, base, captions):
    code = CHILD.format(captions=captions, base=str(base), small=SMALL, call=call)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def test_what_was_encoded_before_a_kill_is_used(tmp_path):
    with start_child("die_slowly(base)", tmp_path, CAPTIONS) as child:
        for _ in range(2):
            assert child.stdout.readline() == "encoded\n"
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.stdout.readline() == "encoded\n"
        child.kill()
    (tmp_path / "parts" / "latents-ff.safetensors.tmp").write_bytes(b"cut off")
    rows, counts = make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    assert counts == (5, 5)
    assert_holds(tmp_path, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "data", "manifest.json"]


def test_a_kill_at_any_point_of_a_commit_loses_nothing(tmp_path):
    old = dict(list(CAPTIONS.items())[:2])
    make_cache(tmp_path / "base", old, shard_bytes=SMALL)
    captions = {"more.mp4": "more words"} | dict(list(old.items())[1:])
    with start_child("die_everywhere()", tmp_path / "base", captions) as child:
        assert child.wait() == 0
    rows = rows_of(captions)
    folders = sorted(tmp_path.glob("killed*"))
    assert len(folders) > 15
    states = set()
    for folder in folders:
        try:
            cache = open_cache(folder, BUCKETS)
        except DataError as error:
            assert "incomplete" in str(error)
            states.add("refused")
        else:
            assert sorted(cache.rows, key=str) == sorted(rows, key=str)
            states.add("complete")
        with CacheWriter(folder) as writer:
            assert encode(writer, rows) == (0, 0), folder.name
            writer.commit(rows, SETTINGS, SMALL)
        assert_holds(folder, rows)
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "data", "manifest.json"]
    assert states == {"refused", "complete"}

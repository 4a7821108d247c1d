"""Memory, open files and progress bars of caches with many clips. No test here measures time."""

import gc
import json
import os
import tracemalloc

import pyarrow as pa
import pytest
from helpers_cache import BUCKETS, SETTINGS, encode, make_cache, row_of, rows_of, tensors_of

from mochi_tune.data import cache_writer, shards
from mochi_tune.data.cache import open_cache
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.manifest import ShardEntry, read_manifest, write_manifest
from mochi_tune.data.order import epoch_order
from mochi_tune.data.row_table import RowTable
from mochi_tune.files import file_sha256

NUM_ROWS = 2000


@pytest.fixture(scope="module")
def rows():
    caption = "a calico cat walks along the garden wall in the evening light, and the camera follows it, take"
    return [row_of(f"scene{i % 7}/clip{i:06}.mp4", f"{caption} {i}", f"{i:064x}") for i in range(NUM_ROWS)]


def test_a_row_that_is_not_read_takes_a_third_of_its_python_object(tmp_path, rows):
    write_manifest(tmp_path, SETTINGS, [(ShardEntry("data/train-00000-of-00001.parquet", 0, "", len(rows)), rows)])
    # Import before measuring memory.
    assert len(read_manifest(tmp_path).rows) == NUM_ROWS
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    manifest = read_manifest(tmp_path)
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert manifest.rows == rows
    # Texts take 400 bytes per row, plus a Python integer for its place. Objects would take 1700.
    assert (python + pa.total_allocated_bytes() - before) / NUM_ROWS < 700
    assert python / NUM_ROWS < 100


def test_an_epoch_of_many_clips_takes_four_bytes_a_clip():
    tracemalloc.start()
    for epoch in range(20):
        epoch_order(NUM_ROWS, 123, epoch, "/growth")
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / (20 * NUM_ROWS) < 6


def test_the_manifest_is_written_shard_by_shard_as_it_was_written_at_once(tmp_path, rows):
    entries = [(ShardEntry(f"data/{i}", 10 + i, "ab", 3), rows[3 * i : 3 * i + 3]) for i in range(3)]
    write_manifest(tmp_path, SETTINGS, entries)
    found = (tmp_path / "manifest.json").read_text()
    assert found == json.dumps(json.loads(found), indent=1)
    shards = json.loads(found)["shards"]
    assert [shard["rows"] for shard in shards] == json.loads(json.dumps([[r.to_json() for r in s] for _, s in entries]))
    assert [list(shard) for shard in shards] == [["file", "bytes", "sha256", "rows"]] * 3


def test_a_table_reads_as_the_list_of_its_rows(rows):
    shuffled = rows[1500:] + rows[:1500]
    table, order = RowTable.from_rows(shuffled).sorted()
    assert table == sorted(rows) and table[-1] == sorted(rows)[-1] and table[3:5] == sorted(rows)[3:5]
    assert [shuffled[i] for i in order] == sorted(rows)
    assert table == RowTable.from_rows(sorted(rows)) and table != RowTable.from_rows(shuffled)
    assert table.column("sample_id") == sorted(row.sample_id for row in rows)
    assert list(table.tuples("start", "captions")) == [(row.start, list(row.captions)) for row in sorted(rows)]


def test_many_shards_keep_no_file_open_and_few_tables(tmp_path, monkeypatch):
    captions = {f"clip{i:03}.mp4": f"clip number {i}" for i in range(60)}
    # Each shard has two clips.
    make_cache(tmp_path, captions, shard_bytes=11_000)
    assert len(list((tmp_path / "data").iterdir())) >= 30
    monkeypatch.setattr(shards, "MAX_TABLE_ROWS", 8)
    cache = open_cache(tmp_path, BUCKETS)
    before = len(os.listdir("/proc/self/fd"))
    for index, row in enumerate(cache.rows):
        assert (cache.read(index)["mean"] == tensors_of(row)["mean"]).all()
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(cache._shards._open) == shards.MIN_OPEN


def test_a_shard_has_so_many_clips_at_most_and_a_full_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "SHARD_ROWS", 4)
    captions = {f"clip{i}.mp4": f"clip number {i}" for i in range(10)}
    make_cache(tmp_path, captions)
    cache = open_cache(tmp_path, BUCKETS)
    assert [shard.num_rows for shard in read_manifest(tmp_path).shards] == [4, 4, 2]
    before = {file_sha256(file) for file in (tmp_path / "data").iterdir()}
    rows, counts = make_cache(tmp_path, captions | {"zoo.mp4": "one more"})
    assert counts == (1, 1) and len(before & {file_sha256(file) for file in (tmp_path / "data").iterdir()}) == 2
    assert open_cache(tmp_path, BUCKETS).rows == rows and len(cache) == 10


def test_an_open_writer_takes_little_for_a_clip(tmp_path):
    captions = {f"clip{i:04}.mp4": f"clip number {i} walks along the garden wall in the light" for i in range(400)}
    make_cache(tmp_path, captions)
    taken = []
    # The minimum of several: threads of other tests in this process may read caches.
    for _ in range(3):
        gc.collect()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        with CacheWriter(tmp_path) as writer:
            gc.collect()
            python = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            taken.append((python + pa.total_allocated_bytes() - before) / len(captions))
            assert writer.clip_report(rows_of(captions)[3].clip_key) == {"scale": 0.5, "name": "clip0003.mp4"}
    # Two keys with their places in Python, the rest in columns; objects would take over 4 kB.
    assert min(taken) < 2000, taken


def test_reading_and_writing_a_cache_have_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_writer, "BAR_DELAY", 0)
    captions = {f"clip{i}.mp4": f"caption number {i}" for i in range(8)}
    make_cache(tmp_path, captions)
    num_bytes = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    assert "writing the cache: 100%|██████████| 8/8" in capsys.readouterr().err
    with CacheWriter(tmp_path) as writer:
        encode(writer, rows_of({"new.mp4": "a new one"}))
    make_cache(tmp_path, captions)
    shown = capsys.readouterr().err
    assert f"checking the cache: 100%|██████████| {num_bytes / 1000:.1f}k" in shown, shown
    # Parts of a clip and its caption, which the cache does not need.
    assert "reading the parts: 100%|██████████| 2/2" in shown and "writing" not in shown

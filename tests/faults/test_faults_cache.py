"""A cache whose files are cut, exchanged, of another hand, or lead elsewhere: refused by name, and left as it is."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_bomb import plant
from helpers_cache import BUCKETS, make_cache, rows_of
from helpers_process import Program
from helpers_road import LORA, prepared, road

from mochi_tune.data.cache import open_cache
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256


@pytest.fixture
def cache(tmp_path) -> Path:
    """A copy of a prepared cache of three clips, which is one shard."""
    shutil.copytree(prepared() / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def shard_of(cache: Path) -> Path:
    [shard] = (cache / "data").iterdir()
    return shard


def refusal(cache: Path, read: bool = True) -> str:
    with pytest.raises(DataError) as error:
        found = open_cache(cache, BUCKETS)
        for index in range(len(found) if read else 0):
            found.read(index)
    assert "\n" not in str(error.value) and str(cache) in str(error.value)
    return str(error.value)


def trainer(cache: Path) -> Program:
    arguments = [*road(cache.with_name("run"), *LORA, "train.steps=3"), f"data.cache={cache}"]
    return Program(["train", "conf=my_lora", *arguments], cache.with_name("log"))


def rewrite(cache: Path, column: str, change, kind: pa.DataType | None = None) -> None:
    """Changes a column of the second clip, or its type, as one would who writes the manifest too."""
    shard, manifest = shard_of(cache), cache / "manifest.json"
    before = pq.read_table(shard)
    values = before[column].to_pylist()
    changed = pa.array([values[0], change(values[1]), values[2]], kind or before.schema.field(column).type)
    table = before.set_column(before.schema.get_field_index(column), column, changed)
    with pq.ParquetWriter(shard, table.schema, compression="none", use_dictionary=False) as writer:
        for row in range(3):
            writer.write_table(table.slice(row, 1))
    entry = json.loads(manifest.read_text())
    entry["shards"][0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    manifest.write_text(json.dumps(entry))


@pytest.mark.parametrize("num_bytes", [0, 1, -1])
def test_a_shard_that_is_cut_off_is_named_before_training(cache, num_bytes):
    shard = shard_of(cache)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(num_bytes % size)
    assert f"data/{shard.name} has {num_bytes % size} of {size} bytes" in refusal(cache, read=False)


def test_a_pickle_in_the_place_of_a_shard_is_not_opened(cache, tmp_path):
    shard = shard_of(cache)
    size = shard.stat().st_size
    plant(shard, tmp_path / "exploded", size)
    assert shard.stat().st_size == size
    assert f"{shard} is damaged" in trainer(cache).refusal
    assert not (tmp_path / "exploded").exists() and not list(tmp_path.rglob("adapter.safetensors"))


@pytest.mark.parametrize(("column", "value"), [("mean", "nan"), ("logvar", "inf"), ("prompt_embeds", "-inf")])
def test_a_number_that_is_none_is_found_when_it_is_read(cache, column, value):
    rewrite(cache, column, lambda values: [*values[:-1], float(value)])
    before = file_sha256(shard_of(cache))
    assert f"the {column} of clip_1.mp4 holds NaN or infinity" in refusal(cache)
    assert file_sha256(shard_of(cache)) == before


def test_a_trainer_stops_at_it_and_names_the_clip(cache):
    rewrite(cache, "mean", lambda values: [float("nan"), *values[1:]])
    assert "the mean of clip_1.mp4 holds NaN or infinity" in trainer(cache).refusal


@pytest.mark.parametrize(
    ("column", "change", "text"),
    [
        ("latent_shape", lambda shape: [6, 4, 4, 6], "clip_1.mp4 has latents (6, 4, 4, 6), not (12, 2, 4, 6)"),
        ("latent_shape", lambda shape: [12, 2, 6, 4], "clip_1.mp4 has latents (12, 2, 6, 4), not (12, 2, 4, 6)"),
        ("latent_shape", lambda shape: [16, *shape[1:]], "clip_1.mp4: shape '[16, 2, 4, 6]' is invalid"),
        ("latent_shape", lambda shape: [2**31 - 1, *shape[1:]], "is invalid for input of size"),
        ("mean", lambda values: values[:-1], "clip_1.mp4: shape '[12, 2, 4, 6]' is invalid"),
        ("num_tokens", lambda counts: [counts[0] + 1], "clip_1.mp4: shape"),
    ],
    ids=["channels", "turned", "too many channels", "huge", "one value less", "one token more"],
)
def test_latents_of_another_shape_are_refused(cache, column, change, text):
    rewrite(cache, column, change)
    assert text in refusal(cache)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float16())])
def test_latents_of_another_precision_are_refused(cache, kind):
    rewrite(cache, "mean", lambda values: values, kind)
    assert "its columns are not those of a shard" in refusal(cache)


def test_a_cache_of_another_vae_size_or_length_is_refused_by_what_differs(cache, tmp_path):
    more = [f"data.cache={cache}", "data.num_frames=13", "data.width=64", "model=toy"]
    found = Program(["train", "conf=my_lora", *road(tmp_path / "run"), *more], tmp_path / "log").refusal
    for text in ("num_frames: the cache has 7", "width: the cache has 48", "vae weights: the cache has"):
        assert text in found


@pytest.mark.parametrize(
    "name", ["../../x.parquet", "/etc/passwd", "data/../../x.parquet", "data/a\0.parquet", "C:\\x.parquet", "",
             "data/train-00000-of-00001.parquet/../../../x", "manifest.json"]
)  # fmt: skip
def test_a_manifest_names_shards_of_its_own_folder_only(cache, tmp_path, name):
    shutil.copy(shard_of(cache), tmp_path / "x.parquet")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert f"names {name!a}, which is not a shard" in refusal(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 3},
        {"shards": [3]},
        {"shards": [{"file": "data/train-00000-of-00001.parquet"}]},
        {"shards": [{"file": "data/train-00000-of-00001.parquet", "bytes": 1, "sha256": "", "rows": [{"path": "x"}]}]},
        {"settings": {}},
        {"settings": []},
        {"schema_version": None},
        {"complete": "yes"},
    ],
)
def test_a_manifest_of_another_build_is_no_manifest_and_prepare_makes_a_new_one(tmp_path, change):
    captions = {"a.mp4": "words", "b.mp4": "more words"}
    make_cache(tmp_path, captions)
    whole = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(whole) | change))
    assert "run `mochi-tune prepare`" in refusal(tmp_path)
    make_cache(tmp_path, captions)
    assert (tmp_path / "manifest.json").read_bytes() == whole
    assert len(open_cache(tmp_path, BUCKETS)) == len(rows_of(captions))


def test_a_trainer_refuses_a_manifest_that_leads_out(cache):
    manifest = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(manifest.replace('"data/train-', '"../train-'))
    assert "names '../train-" in trainer(cache).refusal

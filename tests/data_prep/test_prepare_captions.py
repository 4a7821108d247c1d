"""`prepare` with common forms of captions and datasets."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_cache import BUCKETS
from helpers_video import write_video

import mochi_tune
from mochi_tune.config.load import RunConfig
from mochi_tune.config.schema import DataConfig, ModelConfig
from mochi_tune.data.cache import open_cache
from mochi_tune.data_prep.prepare import prepare
from mochi_tune.errors import DataError
from mochi_tune.recipes.plan import count_clips

TINY = Path(mochi_tune.__file__).parent / "assets" / "tiny"
GEOMETRY = {"num_frames": 7, "height": 32, "width": 48}


def config_for(folder: Path, **data) -> RunConfig:
    return RunConfig(
        device="cpu",
        model=ModelConfig(name="tiny", weights=str(TINY), dtype="fp32"),
        data=DataConfig(
            **GEOMETRY, videos=str(folder / "videos"), cache=str(folder / "cache"), decode_timeout_seconds=600, **data
        ),
    )


def captions_in(folder: Path) -> dict[str, str]:
    return {row.path: " | ".join(row.captions) for row in open_cache(folder / "cache", BUCKETS).rows}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for number, name in enumerate(("a.mp4", "b.mp4")):
        write_video(tmp_path / "videos" / name, 7 + number, width=96, height=64)
    return tmp_path


def test_half_of_a_character_refuses_its_clip_before_anything_is_encoded(clips, capsys):
    rows = ['{"file_name": "a.mp4", "caption": "a cat \\ud83d"}', '{"file_name": "b.mp4", "text": "ok"}']
    (clips / "videos" / "metadata.jsonl").write_text("\n".join(rows))
    done = prepare(config_for(clips))
    assert (done.kept, done.refused, done.captions_encoded) == (1, 1, 1) and captions_in(clips) == {"b.mp4": "ok"}
    reason = f"{clips / 'videos' / 'metadata.jsonl'} row 1: contains half of a character, \\ud83d"
    assert f"1 clip will be refused: {reason}" in capsys.readouterr().out.splitlines()[0]
    [refused, kept] = csv.DictReader((clips / "cache" / "report.csv").open())
    assert (refused["clip"], refused["status"], kept["status"]) == ("a.mp4", "refused", "kept")
    assert refused["reason"].startswith(reason)


def test_where_no_caption_can_be_used_nothing_is_encoded(clips):
    (clips / "videos" / "a.txt").write_bytes(b"a\0")
    (clips / "videos" / "b.txt").write_bytes(b"b\0")
    with pytest.raises(DataError, match=r"none of the 2 clips in .* can be used, see .*report\.csv; .*a\.txt"):
        prepare(config_for(clips))


def test_the_settings_of_captions_reach_the_cache_and_notes_the_user(clips, capsys):
    (clips / "videos" / "a.TXT").write_text("red, KÄSE, big\nline two", encoding="cp1252")
    rows = [{"video": "b.mp4", "prompt": ["of the table", "x"]}, {"video": "c.mp4", "prompt": "x"}]
    (clips / "videos" / "metadata.json").write_text(json.dumps(rows))
    rules = {"captions": "lines", "caption_prefix": "sks", "caption_suffix": ", film", "tag_dropout": 0.999999}
    prepare(config_for(clips, **rules))
    assert captions_in(clips) == {
        "a.mp4": "sks red, film | sks line two, film",
        "b.mp4": "sks of the table, film | sks x, film",
    }
    out = capsys.readouterr().out
    assert "read as cp1252" in out and "a.TXT" in out
    assert "metadata.json: 1 row names a video that is not there: c.mp4" in out


def test_a_dataset_is_prepared_and_a_second_run_encodes_nothing(clips):
    (clips / "videos").rename(clips / "originals")
    (clips / "videos" / "data").mkdir(parents=True)
    files = {name: (clips / "originals" / name).read_bytes() for name in ("a.mp4", "b.mp4")}
    rows = [{"video": {"bytes": files[name], "path": name}, "text": f"about {name}"} for name in files]
    pq.write_table(pa.Table.from_pylist(rows), clips / "videos" / "data" / "train-00000-of-00001.parquet")
    config = config_for(clips)
    assert count_clips(config)[1].startswith("in the dataset")
    for encoded in (2, 0):
        done = prepare(config)
        assert (done.kept, done.refused, done.clips_encoded, done.captions_encoded) == (2, 0, encoded, encoded)
    assert {name[:2]: text for name, text in captions_in(clips).items()} == {"a_": "about a.mp4", "b_": "about b.mp4"}
    assert count_clips(config)[0] == 2
    # The dataset's files are in the cache's folder, but `datasets` does not find them there.
    table = datasets.load_dataset(str(clips / "cache"), cache_dir=str(clips / "hf"))["train"]
    assert len(table) == 2 and "mean" in table.column_names


def test_a_cache_of_another_version_is_planned_for_as_none_and_encoded_again_with_a_line(clips, capsys):
    for name in "ab":
        (clips / "videos" / f"{name}.txt").write_text(name)
    config = config_for(clips)
    assert prepare(config).clips_encoded == 2 and count_clips(config)[0] == 2
    assert "another version" not in capsys.readouterr().out
    manifest = clips / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 3', '"schema_version": 2'))
    assert "prepared by another version of mochi-tune, and to be prepared again" in count_clips(config)[1]
    done = prepare(config)
    assert (done.clips_encoded, done.captions_encoded) == (2, 2)
    said = capsys.readouterr().out
    assert "version of mochi-tune (layout 2, this one reads 3): all clips and captions are encoded again\n" in said

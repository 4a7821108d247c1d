import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, Video

from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.finding import find_videos
from mochi_tune.data_prep.hf_dataset import is_dataset, materialise_dataset
from mochi_tune.errors import DataError

MP4 = b"\0\0\0\x20ftypisom"


def dataset(*rows: dict, caption="caption", kind=None) -> Dataset:
    features = Features({"video": Video(decode=False), caption: kind or Value("string"), "id": Value("int64")})
    rows = [{"id": number, **row} for number, row in enumerate(rows)]
    return Dataset.from_list(rows, features=features)


def row(content: bytes | None, path: str | None, **caption) -> dict:
    return {"video": {"bytes": content, "path": path}, **caption}


def contents(folder: Path) -> dict[bytes, tuple[str, ...]]:
    """Returns the captions by the bytes of the videos, as `prepare` finds them."""
    videos = find_videos(folder)
    found = load_captions(folder, videos, CaptionRules())
    assert not found.refused and not found.notes
    return {video.read_bytes(): found.texts.get(video, ()) for video in videos}


def save_parquet(data: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data.data.table, path)


def save(data: Dataset, folder: Path, way: str) -> None:
    if way == "save_to_disk":
        data.save_to_disk(folder)
    elif way == "splits":
        DatasetDict(train=data, test=dataset(row(b"of the test", "t.mp4", caption="t"))).save_to_disk(folder)
    elif way == "parquet":
        save_parquet(data, folder / "x.parquet")
    else:
        save_parquet(data, folder / "data" / "train-00000-of-00001.parquet")
        save_parquet(
            dataset(row(b"of the test", "t.mp4", caption="t")), folder / "data" / "test-00000-of-00001.parquet"
        )


@pytest.mark.parametrize("way", ["save_to_disk", "splits", "parquet", "hub"])
def test_bytes_become_files_and_captions_a_table(tmp_path, way):
    rows = [row(b"one", "some/a b.mp4", caption="first\nline"), row(b"two", "c.MOV", caption="Käse"), row(b"3", None)]
    save(dataset(*rows), tmp_path / "ds", way)
    assert is_dataset(tmp_path / "ds")
    out = materialise_dataset(tmp_path / "ds", tmp_path / "cache" / "out")
    assert out == tmp_path / "cache" / "out"
    assert contents(out) == {b"one": ("first line",), b"two": ("Käse",), b"3": ()}
    assert sorted(path.name.rpartition("_")[0] for path in find_videos(out)) == ["a_b", "c", "video"]
    assert {path.suffix for path in find_videos(out)} == {".mp4", ".mov"}


def test_what_is_there_is_not_written_again_and_what_is_gone_is_removed(tmp_path):
    save_parquet(
        dataset(row(b"one", "a.mp4", caption="a"), row(b"two", "b.mp4", caption="b")), tmp_path / "ds/x.parquet"
    )
    out = materialise_dataset(tmp_path / "ds", tmp_path / "out")
    [kept] = [path for path in find_videos(out) if path.read_bytes() == b"one"]
    os.utime(kept, (1, 1))
    [cut] = [path for path in find_videos(out) if path.read_bytes() == b"two"]
    cut.write_bytes(b"t")
    materialise_dataset(tmp_path / "ds", out)
    assert kept.stat().st_mtime == 1 and cut.read_bytes() == b"two"
    save_parquet(
        dataset(row(b"new", "b.mp4", caption="n"), row(b"one", "a.mp4", caption="c")), tmp_path / "ds/x.parquet"
    )
    # Files of the user are kept; leftovers of a killed process are removed.
    kept.with_suffix(".txt").write_text("by hand")
    (out / ".b.mp4.1.tmp").write_bytes(b"half")
    materialise_dataset(tmp_path / "ds", out)
    assert contents(out) == {b"one": ("by hand",), b"new": ("n",)} and kept.stat().st_mtime == 1
    [new] = [path.name for path in find_videos(out) if path != kept]
    assert {path.name for path in out.iterdir()} == {kept.name, f"{kept.stem}.txt", new, "metadata.jsonl", ".lock"}


def test_a_row_with_a_path_alone_becomes_a_link(tmp_path, capsys):
    (tmp_path / "ds").mkdir()
    (tmp_path / "away.mkv").write_bytes(b"away")
    (tmp_path / "ds" / "near.mp4").write_bytes(b"near")
    rows = [row(None, str(tmp_path / "away.mkv"), caption="x"), row(None, "near.mp4", caption="y")]
    rows += [row(None, "gone.mp4", caption="z"), row(b"", None, caption="z"), {"video": None, "caption": "z"}]
    # Folders and other kinds of files are not videos.
    (tmp_path / "key").write_bytes(b"secret")
    rows += [row(None, str(tmp_path), caption="z"), row(None, str(tmp_path / "key"), caption="z")]
    save_parquet(dataset(*rows), tmp_path / "ds" / "x.parquet")
    out = tmp_path / "out"
    for _ in range(2):
        materialise_dataset(tmp_path / "ds", out)
        assert contents(out) == {b"away": ("x",), b"near": ("y",)}
        assert all(path.is_symlink() for path in find_videos(out))
    out_text = capsys.readouterr().out
    assert "rows without a video, not used: 2, 3, 4, 5 and 1 more" in out_text
    assert f"{tmp_path / 'ds'}: rows that name files outside of it, used: 1 ({tmp_path / 'away.mkv'})\n" in out_text
    # A file that was changed in place is another clip.
    (tmp_path / "away.mkv").write_bytes(b"other")
    materialise_dataset(tmp_path / "ds", out)
    assert contents(out) == {b"other": ("x",), b"near": ("y",)}


def test_lists_and_equal_videos_are_several_captions(tmp_path):
    rows = [row(b"one", "a.mp4", text=["x", "y"]), row(b"one", "a.mp4", text=["z", "x"]), row(b"two", "a.mp4")]
    save_parquet(dataset(*rows, caption="text", kind=List(Value("string"))), tmp_path / "ds" / "x.parquet")
    assert contents(materialise_dataset(tmp_path / "ds", tmp_path / "out")) == {b"one": ("x", "y", "z"), b"two": ()}


def test_a_column_of_bytes_may_be_the_video(tmp_path):
    table = pa.table({"mp4": [MP4, b"\x1aE\xdf\xa3.", b"RIFF."], "caption": [1, 2, 3], "text": ["a", "b", "c"]})
    (tmp_path / "ds").mkdir()
    pq.write_table(table, tmp_path / "ds" / "x.parquet")
    assert is_dataset(tmp_path / "ds")
    out = materialise_dataset(tmp_path / "ds", tmp_path / "out")
    assert contents(out) == {MP4: ("a",), b"\x1aE\xdf\xa3.": ("b",), b"RIFF.": ("c",)}
    assert {path.suffix for path in find_videos(out)} == {".avi", ".mkv", ".mp4"}


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "日" * 300])
def test_a_path_in_the_dataset_does_not_lead_out_of_the_folder(tmp_path, name):
    (tmp_path / "ds").mkdir()
    pq.write_table(pa.Table.from_pylist([row(b"one", name, caption="a")]), tmp_path / "ds" / "x.parquet")
    out = materialise_dataset(tmp_path / "ds", tmp_path / "out")
    assert contents(out) == {b"one": ("a",)} and {path.name for path in tmp_path.iterdir()} == {"ds", "out"}


def test_other_folders_are_no_datasets(tmp_path):
    assert not is_dataset(tmp_path / "none") and not is_dataset(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "data").mkdir()
    for table in (pa.table({"mean": [b"x"]}), pa.table({"video": ["a.mp4"], "caption": ["x"]})):
        pq.write_table(table, tmp_path / "data" / "x.parquet")
        assert not is_dataset(tmp_path)


def test_a_dataset_that_cannot_be_used_is_an_error_of_one_line(tmp_path):
    def error(call) -> str:
        with pytest.raises(DataError) as info:
            call()
        assert "\n" not in str(info.value)
        return str(info.value)

    folder, out = tmp_path / "ds", tmp_path / "out"
    save_parquet(dataset(row(b"one", "a.mp4", words="x"), caption="words"), folder / "x.parquet")
    assert "its columns are id, video, words" in error(lambda: materialise_dataset(folder, out))
    save_parquet(dataset(row(None, "gone.mp4", caption="x")), folder / "x.parquet")
    assert "none of its 1 rows has a video" in error(lambda: materialise_dataset(folder, out))
    (folder / "x.parquet").write_bytes(b"PAR1")
    assert "x.parquet: cannot be read" in error(lambda: is_dataset(folder))
    assert "x.parquet: cannot be read" in error(lambda: materialise_dataset(folder, out))
    (folder / "dataset_info.json").write_text("{}")
    for state in ({}, {"_data_files": [{"filename": 3}]}, {"_data_files": [{"filename": "../x.arrow"}]}):
        (folder / "state.json").write_text(json.dumps(state))
        assert "save the dataset again" in error(lambda: materialise_dataset(folder, out))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    assert "x.arrow: cannot be read" in error(lambda: materialise_dataset(folder, out))
    (folder / "dataset_dict.json").write_text("[]")
    assert "no JSON object" in error(lambda: materialise_dataset(folder, out))
    (folder / "dataset_dict.json").write_text('{"splits": 3}')
    assert "lists no splits" in error(lambda: materialise_dataset(folder, out))

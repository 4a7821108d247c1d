"""Converts a Hugging Face dataset on disk to a folder of videos with a table of captions.

It reads folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`, and folders of parquet files like those of
the Hub's repositories.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mochi_tune.data_prep.caption_tables import CAPTION_KEYS
from mochi_tune.data_prep.finding import VIDEO_SUFFIXES
from mochi_tune.errors import DataError, printable, some
from mochi_tune.files import file_sha256, lock_file, parse_object, read_json, remove_temporary_files, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE_NAME = "metadata.jsonl"
# Names of video columns, for datasets without that type.
_VIDEO_COLUMNS = ("video", "mp4", "video_bytes")
# The split to use if a dataset has it; the others are for tests.
_TRAIN_SPLIT = "train"
# End of the names that `_file_name` returns.
_WRITTEN_NAME = re.compile(rf"_[0-9a-f]{{16}}({'|'.join(map(re.escape, VIDEO_SUFFIXES))})$")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a saved dataset, or has parquet files with a column of videos."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / "dataset_dict.json").is_file() or _is_saved(folder):
        return True
    for path in _parquet_files(folder)[:1]:
        try:
            return _video_column(pq.read_schema(path)) is not None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}): copy it again.") from None
    return False


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def materialise_dataset(folder: Path, out: Path) -> Path:
    """Writes a dataset's videos to files and their captions to a table next to them, one row at a time.

    A file's name contains the hash of its content: existing files are not written again, and files that are no longer
    in the dataset are removed. A row with a path instead of bytes becomes a link to that file.

    Args:
        folder: of a dataset for which `is_dataset` is true.
        out: folder to write to, created if necessary; nothing else should write there.

    Returns:
        The folder of the videos, `out`.

    Raises:
        DataError: a file of the dataset cannot be read, the dataset has no column of videos, or no row has a video.
        OSError: writing to `out` failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        # A second process waits here, and then finds all videos.
        lock_file(lock, fcntl.LOCK_EX)
        remove_temporary_files(out)
        captions = _write_videos(folder, out)
        rows = [{"file_name": name, "caption": texts} for name, texts in captions.items()]
        write_atomic(out / _TABLE_NAME, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        for path in out.iterdir():
            # Keep other files, such as captions that the user has put next to the videos.
            if _WRITTEN_NAME.search(path.name) and path.name not in captions:
                path.unlink()
    return out


def _write_videos(folder: Path, out: Path) -> dict[str, list[str]]:
    """Writes the missing videos; returns the captions of each video by its file's name."""
    captions: dict[str, list[str]] = {}
    missing: list[str] = []
    outside: list[str] = []
    for number, (video, texts) in enumerate(tqdm(_read_rows(folder), desc="dataset", unit="row")):
        name = _write_video(folder, out, video)
        if name is None:
            missing.append(str(number))
        else:
            captions.setdefault(name, []).extend(texts)
            if not video.get("bytes") and not (out / name).resolve().is_relative_to(folder.resolve()):
                outside.append(video["path"])
    if not captions:
        raise DataError(f"{folder}: none of its {len(missing)} rows has a video, or the path of one that exists.")
    if missing:
        tqdm.write(f"{folder}: rows without a video, not used: {some(missing)}")
    if outside:
        tqdm.write(printable(f"{folder}: rows that name files outside of it, used: {len(outside)} ({outside[0]})"))
    return captions


def _read_rows(folder: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yields the video of each row, as a dict with bytes and path, and its captions."""
    for path in _data_files(folder):
        for batch in _read_batches(path):
            video_column, caption_column = _video_column(batch.schema), _caption_column(batch.schema)
            if video_column is None or caption_column is None:
                raise DataError(
                    f"{path}: its columns are {', '.join(batch.schema.names)}: a column of videos, and one of captions "
                    f"named {', '.join(CAPTION_KEYS)}, are needed."
                )
            for index in range(batch.num_rows):
                video = batch.column(video_column)[index].as_py()
                texts = batch.column(caption_column)[index].as_py()
                texts = texts if isinstance(texts, list) else [texts]
                # A column of plain bytes has no paths.
                file = {"bytes": video} if isinstance(video, bytes) else video
                yield file or {}, [text for text in texts if text is not None]


def _read_batches(path: Path) -> Iterator["pa.RecordBatch"]:
    """Yields the record batches of a file; those of parquet have one row, which may have hundreds of megabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            yield from pq.ParquetFile(path).iter_batches(batch_size=1)
        else:
            with pa.memory_map(str(path)) as source:
                yield from pa.ipc.open_stream(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}): copy it again.") from None


def _data_files(folder: Path) -> list[Path]:
    """Returns the files of the training split, or of all splits if it does not exist."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", DataError).get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise DataError(f"{folder / 'dataset_dict.json'}: lists no splits: save the dataset again.")
        chosen = [_TRAIN_SPLIT] if _TRAIN_SPLIT in splits else splits
        return [file for split in chosen for file in _data_files(_beside(folder, split))]
    if _is_saved(folder):
        files = read_json(folder / "state.json", DataError).get("_data_files")
        if not isinstance(files, list) or not all(
            isinstance(file, dict) and isinstance(file.get("filename"), str) for file in files
        ):
            raise DataError(f"{folder / 'state.json'}: lists no files: save the dataset again.")
        return [_beside(folder, file["filename"]) for file in files]
    files = _parquet_files(folder)
    return [path for path in files if path.name.startswith(_TRAIN_SPLIT)] or files


def _beside(folder: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise DataError(f"{folder}: names files outside its folder: save the dataset again.")
    return folder / name


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _video_column(schema: "pa.Schema") -> str | None:
    """Finds the column with the type Video, else one with a known name and a type that can hold videos."""
    import pyarrow as pa

    described = parse_object((schema.metadata or {}).get(b"huggingface", b"{}")) or {}
    info = described.get("info")
    features = info.get("features") if isinstance(info, dict) else None
    features = features if isinstance(features, dict) else {}
    said = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Video"]
    for name in (*said, *_VIDEO_COLUMNS):
        if name in schema.names:
            kind = schema.field(name).type
            is_file = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if is_file or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    return None


def _caption_column(schema: "pa.Schema") -> str | None:
    import pyarrow as pa

    for name in CAPTION_KEYS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                kind = kind.value_type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return name
    return None


def _write_video(folder: Path, out: Path, video: dict[str, Any]) -> str | None:
    """Writes one video to `out`; returns its file name, or None if the row has no video."""
    content, source = video.get("bytes"), video.get("path") or ""
    if content:
        name = _file_name(source, content[:12], hashlib.sha256(content).hexdigest())
        path = out / name
        if not path.is_file() or path.stat().st_size != len(content):
            write_atomic(path, content)
        return name
    original = (folder / source).absolute()
    if "\0" in source or original.suffix.lower() not in VIDEO_SUFFIXES or not original.is_file():
        return None
    with original.open("rb") as file:
        name = _file_name(source, file.read(12), file_sha256(original))
    if not (out / name).is_symlink() or os.readlink(out / name) != str(original):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(original)
    return name


def _file_name(source: str, head: bytes, sha256: str) -> str:
    """Returns a file name made of the original name and the hash of the content."""
    original = Path(source)
    stem = re.sub(r"[^\w.-]+", "_", original.stem).strip("._")[:40] or "video"
    suffix = original.suffix.lower()
    return f"{stem}_{sha256[:16]}{suffix if suffix in VIDEO_SUFFIXES else _guess_suffix(head)}"


def _guess_suffix(head: bytes) -> str:
    if head.startswith(b"\x1aE\xdf\xa3"):
        return ".mkv"
    return ".avi" if head.startswith(b"RIFF") else ".mp4"

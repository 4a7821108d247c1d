"""Files: complete or not there (temporary name, then rename), synced, hashed; text, JSON and safetensors."""

import codecs
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mochi_tune.errors import CheckpointError, MochiTuneError

if TYPE_CHECKING:
    from torch import Tensor

# The full-size models and adapters need a twentieth of it.
MAX_HEADER_BYTES = 4 * 2**20
# What a disk without locks answers.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What `name_stand_in` needs of a file.
STAND_IN_BYTES = 256
# Codes of dtypes in the library's order: of two tensors, the one of the later dtype comes first in a file.
_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "int16": "I16",
    "float16": "F16", "bfloat16": "BF16", "int32": "I32", "float32": "F32", "float64": "F64", "int64": "I64",
}  # fmt: skip
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def write_atomic(path: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file that appears under its name only when it is complete; it replaces an old one.

    Args:
        path: the file; its folder exists.
        content: all of its bytes.
        durable: whether the content is on disk before it takes its name, so that not even a crash leaves half a file.

    Raises:
        OSError: the disk is full, or refuses; an old file stays as it is.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(content)


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name complete and on disk, and replaces none.

    Until then it has the same temporary name in the folder for every `path`, which may be as long as a name can be.

    Raises:
        FileExistsError: there is one, which stays as it is.
        OSError: the disk is full, or refuses.
    """
    with temporary_file(path.with_name("write_new")) as temporary:
        temporary.write_bytes(content)
        fsync(temporary)
        try:
            # Unlike a rename, a link never replaces what another process has put there.
            os.link(temporary, path)
        except OSError as error:
            if isinstance(error, FileExistsError) or os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            # A file system without hard links, unless the rename fails too.
            os.rename(temporary, path)
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to; when the block ends without an error, the file is renamed to `path`."""
    with temporary_file(path) as temporary:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yields a name in the folder of `path` that no other process uses; an error removes what was written to it."""
    # On a disk of several machines, a process's number is that of others too.
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        yield temporary
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def copy_atomic(source: Path, target: Path) -> None:
    """Copies a file over another; readers see the old or the new one, and the new one is on disk at the end."""
    with atomic_file(target, durable=True) as temporary:
        shutil.copyfile(source, temporary)
    fsync(target.parent)


def move_to_free_name(source: Path, target: Path) -> Path:
    """Renames a file to `target`, or to NAME_2, NAME_3 and so on where that is taken by now; returns the name."""
    for number in count(1):
        free = target if number == 1 else target.with_stem(f"{target.stem}_{number}")
        try:
            # Unlike a rename, a link never replaces what another process has put there.
            os.link(source, free)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links.
            if free.exists():
                continue
            os.rename(source, free)
            return free
        source.unlink()
        return free
    raise AssertionError("count() has no end")


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in a folder to which no process writes now."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def remove_tree(path: Path) -> None:
    """Removes a folder with all that is in it; of a link only the link, and not what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def is_elsewhere(path: Path) -> bool:
    """Whether a path is a link, or another disk is mounted there: it cannot be renamed like what lies beside it."""
    return path.is_symlink() or os.path.ismount(path)


def lock_file(file: IO, operation: int) -> bool:
    """Locks an open file until it is closed, as `fcntl.flock` does.

    Returns:
        Whether it is locked: some network disks have no locks.

    Raises:
        BlockingIOError: the operation does not wait, and another process has the lock.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_writable_folder(folder: Path) -> None:
    """Makes a folder and writes a byte to it, so that one that is not writable fails before any work is done.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write_probe_{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()


def file_sha256(path: Path) -> str:
    """Returns the hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, fallback: str | None = None) -> tuple[str, str]:
    """Reads a text that is UTF-8 or, where its byte order mark says so, UTF-16.

    Args:
        path: the file.
        fallback: a one-byte encoding for a text that is not UTF-8. It is taken only where no control characters come
            out, which a picture or an archive would give.

    Returns:
        The text without its byte order mark and with "\\n" at the end of each line, and the encoding.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is in none of these encodings.
    """
    text, encoding = _read_encoded(path, fallback)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 or UTF-16 text, which "\\n" and "\\r\\n" alone end; raises as `read_text`."""
    return [line.removesuffix("\r") for line in _read_encoded(path, None)[0].split("\n")]


def _read_encoded(path: Path, fallback: str | None) -> tuple[str, str]:
    """Returns a text as it stands in the file, without its byte order mark, and its encoding."""
    content = path.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        decoded = _decode_printable(content, fallback) if fallback and encoding == "utf-8" else None
        if fallback is None or decoded is None:
            raise
        text, encoding = decoded, fallback
    return text, encoding


def find_lone_surrogate(text: str) -> str | None:
    """Returns the first half of a character in a text, escaped, or None; JSON can hold it, and no encoding can."""
    return next((f"\\u{ord(c):04x}" for c in text if "\ud800" <= c <= "\udfff"), None)


def _decode_printable(content: bytes, encoding: str) -> str | None:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return None
    is_printable = all(unicodedata.category(c) != "Cc" or c in "\t\n\r\f" for c in set(text))
    return text if is_printable else None


def read_json(path: Path, error: type[MochiTuneError] = CheckpointError) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: the file.
        error: what to raise where that is not possible.

    Raises:
        MochiTuneError: the file is missing or holds no JSON object; of the class `error`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as reason:
        kind = "" if isinstance(reason, OSError | UnicodeDecodeError) else name_stand_in(text.encode())
        raise error(f"{path} cannot be read as JSON ({f'it is {kind}' if kind else reason}).") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object.")
    return value


def write_json(path: Path, value: object) -> None:
    """Writes a value as readable JSON, straight to its name."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """Returns the JSON object that a text holds, or None where it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def name_stand_in(start: bytes) -> str:
    """Says what stands in the place of a file: a web page, which a failed download leaves, or a Git LFS pointer.

    Args:
        start: the first STAND_IN_BYTES of the file.

    Returns:
        What it is, with an article; "" where it is neither.
    """
    text = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "a web page, such as a login or an error page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which `git lfs pull` replaces by the file"
    return ""


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; [] where there is no file.

    A line that holds none is left out: a killed process may have left a part of one.
    """
    # Not splitlines(), which also breaks at characters that JSON allows inside a string.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [value for value in map(parse_object, lines) if value is not None]


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Reads all tensors of a safetensors file to the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def save_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None, durable: bool = False
) -> None:
    """Writes a safetensors file as `write_atomic` does; the same tensors and metadata make the same bytes.

    Raises:
        OSError: the disk is full, or refuses.
    """
    with atomic_file(path, durable) as temporary, open(temporary, "wb") as file:
        for part in safetensors_parts(tensors, metadata):
            file.write(part)


def safetensors_parts(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None) -> Iterator[Any]:
    """Yields the bytes of a safetensors file, its header and each tensor; the library makes two copies of all of them.

    It is what the library writes, but that the metadata is in order, and not in another one in each process. The header
    is JSON, after its length in 8 bytes, and ends in spaces so that the tensors start at a multiple of 8.
    Source: huggingface/safetensors@0.8 README.md (Format), safetensors/src/tensor.rs (prepare).
    """
    import torch

    codes, order = {name: _CODES[str(tensor.dtype)[6:]] for name, tensor in tensors.items()}, list(_CODES.values())
    names = sorted(tensors, key=lambda name: (-order.index(codes[name]), name))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {"dtype": codes[name], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_header(path: Path) -> None:
    """Refuses a safetensors header that no model needs, before the library parses it: over-long, or a name in it twice.

    The library itself checks offsets, sizes and dtypes; but it reads a header of a million tensors, for half a minute.

    Raises:
        ValueError: saying what is wrong with the header.
    """
    with open(path, "rb") as file:
        if kind := name_stand_in(file.read(STAND_IN_BYTES)):
            raise ValueError(f"it is {kind}")
        file.seek(0)
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header says it is {num_bytes} bytes long, and {MAX_HEADER_BYTES} are the most")
        header = file.read(num_bytes)
    try:
        json.loads(header, object_pairs_hook=_refuse_twice)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its header is no JSON, or cut short") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("its header has a name twice")
    return entries


def format_bytes(num_bytes: int) -> str:
    """Returns a size as people read it: in GiB, MiB or kB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes / 1000:.3g} kB"

"""Files: atomic writes through a temporary name, fsync, locks and hashes; JSON and safetensors."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mochi_tune.errors import CheckpointError, MochiTuneError, name_stand_in

if TYPE_CHECKING:
    from torch import Tensor, dtype

# Errors of a full disk, and of a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of a disk that fails, is lost or cannot be written to.
_FAILS = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)
# Errors of a disk without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# safetensors' codes of torch's dtypes, in the library's order. A file holds the tensors of later dtypes first.
_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "int16": "I16",
    "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32",
    "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip


def write_atomic(path: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file atomically: readers see the old file or the complete new one.

    Args:
        path: the file; its folder exists.
        content: all of its bytes.
        durable: whether to sync the content before the rename, so that not even a crash leaves an incomplete file.

    Raises:
        OSError: the disk is full or refuses; an existing file stays as it is.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(content)


def write_new(path: Path, content: bytes) -> None:
    """Writes a new file atomically and durably; never replaces one.

    The temporary name does not depend on that of `path`, which may be as long as the file system allows.

    Raises:
        FileExistsError: the file exists; it stays as it is.
        OSError: the disk is full or refuses.
    """
    with temporary_file(path.with_name("write_new"), path) as temporary:
        temporary.write_bytes(content)
        fsync(temporary)
        _rename_new(temporary, path)


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path` when the block ends without an error."""
    with temporary_file(path) as temporary:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_file(path: Path, named: Path | None = None) -> Iterator[Path]:
    """Yields a path in the folder of `path` that no other process uses; an error removes what was written there.

    An error of the disk names `named`, or else `path`.
    """
    temporary = path.with_name(temporary_name(path.name, os.getpid()))
    with naming(named or path, temporary):
        try:
            yield temporary
        except BaseException:
            # A disk that refused to write may refuse this too; the first error says what is wrong.
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path | str, temporary: Path | None = None) -> Iterator[None]:
    """Makes errors of the disk name `path`: the system names no file when it refuses to write to an open one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        is_temporary = temporary is not None and error.filename == str(temporary)
        # A full disk is never that of another file, such as the source of a copy.
        if is_temporary or error.errno in _FULL or (error.errno in _FAILS and error.filename is None):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def temporary_name(name: str, process: int | str) -> str:
    """Returns the name that a process of this machine or container gives to the temporary file of a file."""
    return f".{name}.{_host()}-{process}.tmp"


@cache
def _host() -> str:
    # Machines that share a disk can have the same process ids, and so can containers with the same host name.
    processes = os.readlink(path) if os.path.islink(path := "/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:6]


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder; no process may be writing to it."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that ended processes of this machine or container left in a folder.

    Args:
        folder: the folder; it need not exist.
        name: removes only those of the file of this name, which this process is about to write.
    """
    import psutil

    for path in folder.glob(temporary_name("*" if name is None else glob.escape(name), "*")):
        process = path.stem.rpartition("-")[2]
        # Another thread of this process may be writing another file.
        is_own = process == str(os.getpid())
        if process.isdecimal() and (name is not None if is_own else not psutil.pid_exists(int(process))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_atomic(source: Path, target: Path) -> None:
    """Copies a file atomically and durably, over an existing one if there is one."""
    with atomic_file(target, durable=True) as temporary:
        shutil.copyfile(source, temporary)
    fsync(target.parent)


def move_to_free_name(source: Path, target: Path) -> Path:
    """Renames a file to `target`, or to NAME_2, NAME_3 and so on if that name is taken; returns the new path."""
    for number in count(1):
        free = target if number == 1 else target.with_stem(f"{target.stem}_{number}")
        with contextlib.suppress(FileExistsError):
            _rename_new(source, free)
            return free
    raise AssertionError("count() has no end")


def _rename_new(source: Path, target: Path) -> None:
    """Renames a file; raises FileExistsError if something has the new name."""
    try:
        # Unlike a rename, a link never replaces a file that another process has just written.
        os.link(source, target)
    except OSError as error:
        if isinstance(error, FileExistsError) or os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        # The file system has no hard links, or the rename fails too.
        os.rename(source, target)
    else:
        source.unlink()


def is_elsewhere(path: Path) -> bool:
    """Whether a path is a link or a mount point, which cannot be replaced by renaming a folder next to it."""
    return path.is_symlink() or os.path.ismount(path)


def lock_file(file: IO, operation: int) -> bool:
    """Locks an open file with `fcntl.flock` until it is closed.

    Returns:
        Whether the file is locked; some network disks have no locks.

    Raises:
        BlockingIOError: `operation` has LOCK_NB, and another process holds the lock.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def fsync(path: Path) -> None:
    """Waits until the bytes of a file or the entries of a folder are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def make_writable_folder(folder: Path) -> None:
    """Makes a folder and writes a byte to it, so that missing permissions show before any work is done.

    Removes the temporary files that killed processes left there.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_behind(folder)
    with temporary_file(folder / "write_probe", folder) as probe:
        probe.write_bytes(b"x")
        probe.unlink()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file in hex, without holding the file in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, error: type[MochiTuneError] = CheckpointError) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: the file.
        error: class of the error to raise.

    Raises:
        MochiTuneError: the file is missing or is not a JSON object; an instance of `error`.
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
    """Writes a value as indented JSON, not atomically."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """Returns the JSON object of a text, or None if the text is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line; returns [] if there is no file.

    Other lines are skipped, because a killed process may have left an incomplete one.
    """
    # Not splitlines(), which also splits at characters that JSON allows inside a string.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [value for value in map(parse_object, lines) if value is not None]


def append_line(file: IO[bytes], line: bytes, durable: bool = False) -> None:
    """Appends a line to a file; a killed process or a full disk may have left it an incomplete last line.

    Args:
        file: the file, opened with mode "a+b" and no buffer, which would keep and repeat what the disk refused.
        line: the line, without its end.
        durable: whether to wait until the line is on disk.

    Raises:
        OSError: the disk is full or refuses; the error names the file.
    """
    with naming(file.name):
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        # An incomplete line ends here, so that it does not spoil this one.
        end = b"" if file.read(1) in (b"", b"\n") else b"\n"
        rest = end + line + b"\n"
        while rest:
            rest = rest[file.write(rest) :]
        if durable:
            os.fsync(file.fileno())


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Loads all tensors of a safetensors file to the CPU.

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
    """Writes a safetensors file atomically; the same tensors and metadata give the same bytes.

    Raises:
        OSError: the disk is full or refuses; an existing file stays as it is, also after the other errors.
        TypeError, ValueError, CheckpointError: as `safetensors_header`.
    """
    with atomic_file(path, durable) as temporary, open(temporary, "wb") as file:
        for part in safetensors_parts(tensors, metadata):
            file.write(part)


def safetensors_parts(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None) -> Iterator[Any]:
    """Yields the bytes of a safetensors file: the header, then each tensor.

    They are the bytes of the library, except that the metadata is sorted, which the library orders at random. The
    library would hold two copies of all tensors. Raises as `safetensors_header`.
    """
    import torch

    order = list(_CODES.values())
    names = sorted(tensors, key=lambda name: (-order.index(_code(name, tensors[name].dtype)), name))
    yield safetensors_header({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}, metadata)
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def safetensors_header(
    layout: Mapping[str, tuple["dtype", tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """Returns the bytes before the tensors: the length of the header in 8 bytes, and the header as JSON.

    Spaces pad the header, so that the tensors start at a multiple of 8.
    Source: huggingface/safetensors@0.8 README.md (Format), safetensors/src/tensor.rs (prepare).

    Args:
        layout: dtype and shape of each tensor by name, in the order of the file.
        metadata: strings by name; None for a file without metadata.

    Raises:
        TypeError: a name or a value in `metadata` is not a string.
        ValueError: a tensor has the name of the metadata.
        CheckpointError: the format has no code for a dtype.
    """
    if wrong := [item for item in (metadata or {}).items() if not all(isinstance(text, str) for text in item)]:
        raise TypeError(f"the metadata of a safetensors file takes strings, got {wrong[0]!r}")
    if "__metadata__" in layout:
        raise ValueError("a tensor cannot have the name __metadata__, which is that of the file's metadata")
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _code(name, dtype), "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _code(name: str, dtype: "dtype") -> str:
    code = _CODES.get(str(dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"{name} is {dtype}, which cannot be saved: use one of {', '.join(_CODES)}.")
    return code

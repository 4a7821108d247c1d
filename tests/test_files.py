import errno
import json
import os
import resource
import socket
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save

from mochi_tune import files
from mochi_tune.errors import CheckpointError
from mochi_tune.files import load_tensors, save_tensors, write_new

SAVE = """
import sys, torch
from pathlib import Path
from mochi_tune.files import save_tensors
dtypes = (torch.float32, torch.bfloat16, torch.uint8)
tensors = {f"t{i}": torch.arange(i + 1, dtype=dtype) for i, dtype in enumerate(dtypes)}
metadata = {f"key {i}": 'ü "\\\\n\\n\\x01' * i for i in range(20)}
save_tensors(Path(sys.argv[1]), tensors, metadata)
"""


def test_the_same_tensors_and_metadata_are_the_same_file_in_every_process(tmp_path):
    # Rust orders a map at random in each process; this seed orders Python's sets.
    runs = [
        subprocess.Popen([sys.executable, "-c", SAVE, tmp_path / seed], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("0", "1", "2")
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    contents = [(tmp_path / seed).read_bytes() for seed in ("0", "1", "2")]
    assert contents[0] == contents[1] == contents[2]
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == {f"key {i}": 'ü "\\n\n\x01' * i for i in range(20)}
        assert list(file.metadata()) and file.get_tensor("t1").tolist() == [0, 1]
    num_bytes = int.from_bytes(contents[0][:8], "little")
    assert num_bytes % 8 == 0, "the format requires tensors to start at a multiple of 8"
    header = json.loads(contents[0][8 : 8 + num_bytes])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_a_file_is_what_the_library_writes(tmp_path):
    dtypes = [
        *(torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int16, torch.uint16, torch.float16, torch.bfloat16),
        *(torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64),
    ]
    whole = torch.arange(12).reshape(3, 4)
    tensors = {
        f"{name}{i}": whole.to(dtype, copy=True) for i, dtype in enumerate(dtypes) for name in ("ü", "a.b", 'q"')
    }
    tensors |= {"turned": whole.float().T, "empty": torch.zeros(0, 3), "one": torch.tensor(2.0), "part": whole[:, 1:3]}
    for metadata in (None, {}, {"a key": 'ü "\\n\n\x01'}):
        save_tensors(tmp_path / "a", tensors, metadata)
        expected = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        assert (tmp_path / "a").read_bytes() == expected


def test_what_the_format_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    save_tensors(tmp_path / "a", {"a": torch.zeros(3)})
    old = (tmp_path / "a").read_bytes()
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for tensors, metadata, error, said in (
        ({"a": packed}, None, CheckpointError, "a is torch.float4_e2m1fn_x2, which cannot be saved: use one of bool, "),
        ({"a": torch.zeros(1)}, {"step": 300}, TypeError, r"takes strings, got \('step', 300\)"),
        ({"a": torch.zeros(1)}, {3: "x"}, TypeError, r"takes strings, got \(3, 'x'\)"),
        ({"__metadata__": torch.zeros(1)}, {}, ValueError, "a tensor cannot have the name __metadata__"),
    ):
        with pytest.raises(error, match=said):
            save_tensors(tmp_path / "a", tensors, metadata)
        assert (tmp_path / "a").read_bytes() == old and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_file_without_metadata_has_none(tmp_path):
    save_tensors(tmp_path / "a", {"a": torch.zeros(3)})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() is None and file.keys() == ["a"]
    assert load_tensors(tmp_path / "a")["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_none(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    # The maximum length of a file name.
    path = tmp_path / f"{'n' * 251}.txt"
    write_new(path, b"first")
    with pytest.raises(FileExistsError) as caught:
        write_new(path, b"second")
    assert caught.value.filename == str(path) and path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_of_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "source").write_bytes(bytes(100))
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    table = pa.table({"a": list(range(1000))})

    def write_table():
        with files.atomic_file(tmp_path / "t.parquet") as temporary:
            parquet.write_table(table, temporary)

    writes = {
        "a": lambda: files.write_atomic(tmp_path / "a", bytes(100)),
        "copy": lambda: files.copy_atomic(tmp_path / "source", tmp_path / "copy"),
        "t.parquet": write_table,
        "new": lambda: write_new(tmp_path / "new", bytes(100)),
        "": lambda: files.make_writable_folder(tmp_path),
    }
    for name, write in writes.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 if name else 0, former[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_incomplete_last_line_does_not_spoil_the_next_one(tmp_path):
    for start, expected in ((None, b"b\n"), (b"a\n", b"a\nb\n"), (b"a\n{", b"a\n{\nb\n"), (b"\0", b"\0\nb\n")):
        path = tmp_path / "log"
        path.unlink(missing_ok=True)
        if start is not None:
            path.write_bytes(start)
        with open(path, "a+b", buffering=0) as file:
            files.append_line(file, b"b", durable=True)
            files.append_line(file, b"c")
        assert path.read_bytes() == expected + b"c\n"
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match="No space left") as caught:
        files.append_line(full, b"b")
    assert caught.value.filename == "/dev/full"


def test_a_line_that_a_full_disk_cut_off_is_written_whole_when_it_is_appended_again(tmp_path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "log", "a+b", buffering=0) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, former[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                files.append_line(file, b"abc")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        files.append_line(file, b"abc")
    assert caught.value.filename == str(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b"ab\nabc\n"


def test_an_error_of_the_disk_names_the_file_and_not_its_temporary_one(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def refuse(path, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_atomic(tmp_path / "a", b"content", durable=True)
    assert caught.value.filename == str(tmp_path / "a") and not list(tmp_path.iterdir())
    monkeypatch.setattr(type(tmp_path), "write_bytes", lambda path, _: refuse(path))
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        files.write_atomic(tmp_path / "a", b"content")
    assert caught.value.filename == str(tmp_path / "a")


def test_the_content_of_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []

    def record(name):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments: (calls.append(name), function(*arguments)))

    for name in ("fsync", "link", "replace"):
        record(name)
    write_new(tmp_path / "a", b"content")
    assert calls == ["fsync", "link"]
    calls.clear()
    files.copy_atomic(tmp_path / "a", tmp_path / "b")
    assert calls == ["fsync", "replace", "fsync"], "the folder is synced last"


def test_machines_and_containers_that_share_a_disk_do_not_share_temporary_files(tmp_path, monkeypatch):
    names = set()
    monkeypatch.setattr(files, "_host", files._host.__wrapped__)  # Without its cache.
    monkeypatch.setattr(os.path, "islink", lambda _: True)
    for host, container in (("node-1", "pid:[1]"), ("node-2", "pid:[1]"), ("node-1", "pid:[2]")):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "readlink", lambda _, container=container: container)
        with files.temporary_file(tmp_path / "a") as path:
            names.add(path.name)
    assert len(names) == 3

import errno
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_video import frame_number, write_bad_video, write_video

from mochi_tune.data_prep import decoder as decoder_module
from mochi_tune.data_prep import watched
from mochi_tune.data_prep.clips import Cut, DecodedClip, decode_clip
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.errors import DataError


def _numbers(clip: DecodedClip) -> list[int]:
    return [frame_number(frame) for frame in clip.frames]


def _error(path: Path, cut: Cut) -> str:
    with pytest.raises(DataError) as info:
        decode_clip(path, cut)
    return str(info.value)


def _child() -> multiprocessing.Process:
    (child,) = [child for child in multiprocessing.active_children() if child.name == "decoder"]
    return child


def test_the_child_gives_the_same_clips_and_errors_and_keeps_quiet_and_slim(tmp_path, capfd):
    cut = Cut(85, 96, 96)
    good = write_video(tmp_path / "good.mp4", 90, width=128, height=112)
    short = write_video(tmp_path / "short.mkv", 30, width=128, height=112)
    damaged = write_bad_video(tmp_path, "damaged")
    errors = {path: _error(path, cut) for path in (short, damaged)}
    expected = decode_clip(good, cut)
    capfd.readouterr()
    with ClipDecoder(timeout_seconds=600) as decoder:
        paths = [good, short, good, damaged, good]
        results = list(decoder.cut_all([(path, [cut]) for path in paths]))
        assert capfd.readouterr().err == ""
        assert [(path, index) for path, index, _ in results] == [(path, 0) for path in paths]
        for path, _, result in results:
            if path == good:
                assert torch.equal(result.frames, expected.frames) and result.report == expected.report
            else:
                assert isinstance(result, DataError) and str(result) == errors[path]
        with pytest.raises(DataError):
            decoder.cut(short, cut)
        assert decoder.scan(good) == scan_video(good)
        with pytest.raises(DataError, match="No such file"):
            decoder.scan(tmp_path / "none.mp4")
        child = _child()
        sizes = []
        for _ in range(3):
            for _ in range(25):
                decoder.cut(good, cut)
            sizes.append(int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        # A leaked clip takes 2 MB; the allocator's memory varies by about 40 MB.
        assert sizes[2] - sizes[0] < 90 * 2**20
    assert not child.is_alive()


def test_the_cuts_of_a_file_come_in_order_and_each_has_its_own_error(tmp_path):
    long, short = (write_video(tmp_path / f"{n}.mp4", n) for n in (40, 10))
    cuts = [Cut(7, 64, 64, start=0), Cut(7, 32, 32, start=4), Cut(99, 64, 64, start=4), Cut(7, 80, 64, start=5)]
    cuts.append(Cut(7, 64, 64, start=33))
    with ClipDecoder(timeout_seconds=600) as decoder:
        results = list(decoder.cut_all([(long, cuts), (short, cuts[:1]), (long, []), (short, cuts[1:2])]))
    assert [(path, index) for path, index, _ in results] == [
        (long, 0), (long, 1), (long, 2), (long, 3), (long, 4), (short, 0), (short, 0)
    ]  # fmt: skip
    clips = [clip for _, _, clip in results]
    assert "has 40 frames at 30 fps, needs 99 from frame 4 on" in str(clips[2])
    assert "too small for 64x80" in str(clips[3])
    begins = [_numbers(clip)[0] for clip in clips if isinstance(clip, DecodedClip)]
    assert begins == [0, 4, 33, 0] and "has 10 frames" in str(clips[6])


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError])
def test_an_unexpected_exception_refuses_its_file_and_no_other(tmp_path, monkeypatch, kind):
    """Runs the server in a thread of this process, so that its code can be patched."""
    good, bad = (write_video(tmp_path / f"{name}.mp4", 14) for name in ("good", "bad"))

    def broken(path, cuts):
        yield decode_clip(path, cuts[0])
        if path == bad:
            raise kind("no such\nluck")
        yield decode_clip(path, cuts[1])

    def broken_scan(path):
        raise kind("no such luck")

    class Thread(threading.Thread):
        pid, exitcode = 0, 0

        def kill(self):
            pass

    class Context:
        def Process(self, args, **options):
            # The parent closes its copy of the child's end.
            return Thread(args=(args[0].dup(),), **options)

    monkeypatch.setattr(decoder_module, "try_clips", broken)
    monkeypatch.setattr(decoder_module, "scan_video", broken_scan)
    monkeypatch.setattr(watched, "child_context", Context)
    monkeypatch.setattr(watched.signal, "signal", lambda *_: None)
    cuts = [Cut(7, 64, 64), Cut(7, 64, 64, start=7), Cut(7, 64, 64, start=7)]
    with ClipDecoder(timeout_seconds=600) as decoder:
        results = [clip for _, _, clip in decoder.cut_all([(bad, cuts), (good, cuts[:2])])]
        with pytest.raises(DataError, match=rf"^{good}: cannot be decoded \({kind.__name__}: no such luck\)"):
            decoder.scan(good)
        decoder._child.socket.shutdown(socket.SHUT_RDWR)
        decoder._child.process.join()
    assert [isinstance(clip, DecodedClip) for clip in results] == [True, False, False, True, True]
    assert str(results[1]).startswith(f"{bad}: cannot be decoded ({kind.__name__}: no such luck)")


def test_a_clip_that_hangs_is_refused_and_the_next_one_decodes(tmp_path):
    good = write_video(tmp_path / "good.mp4", 37, width=96, height=96)
    hanging = tmp_path / "hanging.mp4"
    os.mkfifo(hanging)
    cut = Cut(37, 96, 96)
    # A short timeout for the file that hangs, a long one for the others on a busy machine.
    with ClipDecoder(timeout_seconds=600) as decoder:
        assert _numbers(decoder.cut(good, cut)) == list(range(37))
        first = _child()
        results = decoder.cut_all([(hanging, [cut, cut]), (good, [cut])])
        decoder.timeout_seconds = 1.5
        assert str(next(results)[2]).startswith(f"{hanging}: the decoder did not answer within 1.5 s")
        # The rest of its file is refused with it.
        assert str(next(results)[2]).startswith(f"{hanging}: the decoder did not answer within 1.5 s")
        decoder.timeout_seconds = 600
        assert _numbers(next(results)[2]) == list(range(37))
        assert not first.is_alive()
        # The child is stopped while it sends a clip that is larger than the socket's buffer.
        ahead = decoder.cut_all([(good, [cut]), (good, [cut])])
        next(ahead)
        time.sleep(0.5)
        os.kill(_child().pid, signal.SIGSTOP)
        # SIGSTOP takes effect only when the child blocks on the full buffer.
        while psutil.Process(_child().pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        decoder.timeout_seconds = 1.5
        _, _, result = next(ahead)
        assert str(result).startswith(f"{good}: the decoder did not answer within 1.5 s")


def _kill_when_it_reads(pid: int, fifo: Path) -> None:
    """Kills a process that has opened a pipe to read from it, while the pipe is open."""
    with open(fifo, "wb"):
        os.kill(pid, signal.SIGKILL)


def test_a_clip_that_kills_the_child_is_refused_and_the_next_one_decodes(tmp_path):
    good = write_video(tmp_path / "good.mp4", 7)
    hanging = tmp_path / "hanging.mp4"
    os.mkfifo(hanging)
    cut = Cut(7, 64, 64)
    with ClipDecoder(timeout_seconds=600) as decoder:
        decoder.cut(good, cut)
        threading.Thread(target=_kill_when_it_reads, args=(_child().pid, hanging), daemon=True).start()
        with pytest.raises(DataError, match=rf"^{hanging}: the decoder process died \(killed by SIGKILL\)"):
            decoder.cut(hanging, cut)
        assert _numbers(decoder.cut(good, cut)) == list(range(7))
        # If the child is killed between two clips, the next clip is not refused.
        child = _child()
        child.kill()
        child.join()
        assert _numbers(decoder.cut(good, cut)) == list(range(7))


def _is_being_read(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


def test_exactly_one_clip_is_decoded_ahead_and_waits_for_a_late_caller(tmp_path):
    good = [write_video(tmp_path / f"good{number}.mp4", 7, first_number=number) for number in range(2)]
    fifos = [tmp_path / "second.mp4", tmp_path / "third.mp4"]
    for fifo in fifos:
        os.mkfifo(fifo)
    cut = Cut(7, 64, 64)
    with ClipDecoder(timeout_seconds=600) as decoder:
        ahead = decoder.cut_all([(path, [cut]) for path in (good[0], *fifos)])
        next(ahead)
        # Only a clip that the child has opened can be opened for writing; doing so also ends it.
        deadline = time.monotonic() + 600
        while not _is_being_read(fifos[0]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert not _is_being_read(fifos[1])
        ahead.close()
        assert multiprocessing.active_children() == []
        late = decoder.cut_all([(path, [cut]) for path in good])
        next(late)
        # The second clip has arrived, but was requested longer ago than the timeout.
        decoder._child.socket.recv(1, socket.MSG_PEEK | socket.MSG_WAITALL)
        decoder._requested_at -= 1000
        path, _, clip = next(late)
        assert path == good[1] and _numbers(clip) == list(range(1, 8))

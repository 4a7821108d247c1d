"""Decodes in a child process, which may hang or die on a clip without ending the run."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mochi_tune.data_prep.clips import Cut, DecodedClip, try_clips
from mochi_tune.data_prep.probe import Scan, scan_video
from mochi_tune.data_prep.watched import child_context
from mochi_tune.errors import DataError

# For the child to import torch and PyAV from a slow disk.
START_SECONDS = 120.0


class ClipDecoder:
    """Scans and decodes files in a child process, which may hang or die on one of them without ending the run.

    Native code can loop for ever on a damaged file, so only another process can stop it, see `child_context`. Frames
    travel through a socket straight into the tensor that the caller gets. Whatever goes wrong with one file, a bug
    included, is a DataError for that file.

    Use as a context manager:
        with ClipDecoder(timeout_seconds=120) as decoder:
            scans = [decoder.scan(path) for path in paths]
            for path, index, clip in decoder.cut_all(jobs): ...

    Args:
        timeout_seconds: what one scan or one clip may take before the child is killed.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._child: _Child | None = None
        self._asked: Path | None = None
        self._asked_at = 0.0
        self._ahead: tuple[Path, list[Cut]] | None = None

    def __enter__(self) -> "ClipDecoder":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, whatever it is doing; a later call starts another one.

        Another thread than the one that waits for an answer may call it, which then gets none.
        """
        child, self._child, self._asked, self._ahead = self._child, None, None, None
        if child is not None:
            child.process.kill()
            # A process that waits for a dead network disk cannot even be killed; leave it behind.
            child.process.join(5)
            child.socket.close()

    def scan(self, path: Path) -> Scan:
        """Reads a file's properties as `scan_video` does.

        Raises:
            DataError: as `scan_video`; also when it takes longer than `timeout_seconds` or kills the child.
        """
        self._ask(path, {"scan": str(path)})
        reply, _ = self._answer()
        return Scan.from_json(reply["values"])

    def cut(self, path: Path, cut: Cut) -> DecodedClip:
        """Decodes one clip as `decode_clip` does.

        Raises:
            DataError: as `decode_clip`; also when the clip takes longer than `timeout_seconds` or kills the child.
        """
        ((_, _, result),) = self.cut_all([(path, [cut])])
        if isinstance(result, DataError):
            raise result
        return result

    def cut_all(
        self, jobs: Iterable[tuple[Path, Sequence[Cut]]], ahead: tuple[Path, Sequence[Cut]] | None = None
    ) -> Iterator[tuple[Path, int, DecodedClip | DataError]]:
        """Decodes clips in turn, the next one while the caller works on the present one.

        Args:
            jobs: files, each with its cuts as for `cut_clips`.
            ahead: the first job of the next call, which is begun while the caller works on the last clip of this one.

        Yields:
            For each cut in order the path, the cut's index in its file, and the clip or the error that refuses it.
            When the child hangs or dies on a clip, the rest of its file is refused with it.
        """
        wanted = [(path, index, cuts) for path, cuts in jobs for index in range(len(cuts))]
        after = [] if ahead is None else [(ahead[0], 0, ahead[1])]
        lost: DataError | None = None
        try:
            for number, (path, index, cuts) in enumerate(wanted):
                if index == 0:
                    lost = None
                if number == 0:
                    begun, self._ahead = self._ahead, None
                    if begun != (path, list(cuts)):
                        if begun is not None:
                            self.close()
                        self._ask_cut(path, index, cuts)
                result: DecodedClip | DataError
                if lost is not None:
                    result = lost
                else:
                    try:
                        reply, frames = self._answer()
                        result = DecodedClip(frames, reply["report"])
                    except DataError as error:
                        result = error
                        # A child that was lost knows nothing of the file's other cuts.
                        lost = error if self._child is None else None
                following = next(iter([*wanted[number + 1 : number + 2], *after]), None)
                if following is not None and (lost is None or following[1] == 0):
                    self._ask_cut(*following)
                    if number + 1 == len(wanted):
                        self._ahead = following[0], list(following[2])
                yield path, index, result
        finally:
            if self._asked is not None and self._ahead is None:
                self.close()

    def _ask_cut(self, path: Path, index: int, cuts: Sequence[Cut]) -> None:
        """Asks for a file's first cut, or for its next one."""
        self._ask(path, {"next": True} if index else {"cut": str(path), "cuts": [asdict(cut) for cut in cuts]})

    def _ask(self, path: Path, message: dict) -> None:
        assert self._asked is None, f"{self._asked} is still being decoded"
        is_new = self._child is None or not self._child.process.is_alive()
        # The next cut of a file is asked of the child that has the file open, and of no other.
        if is_new and "next" not in message:
            self.close()
            self._child = _Child()
        assert self._child is not None
        self._asked, self._asked_at = path, time.monotonic()
        # If the child has just died, the missing answer will say so.
        with contextlib.suppress(ConnectionError):
            _send(self._child.socket, message)

    def _answer(self) -> tuple[dict, torch.Tensor]:
        """Waits for what was asked for; kills the child if it does not come."""
        path, child = self._asked, self._child
        assert child is not None
        try:
            if not child.is_ready:
                _receive(child.socket, time.monotonic() + START_SECONDS)
                child.is_ready, self._asked_at = True, time.monotonic()
            # An answer that has been waiting for a late caller is read at once, even after its time.
            reply = _receive(child.socket, self._asked_at + self.timeout_seconds)
            frames = torch.empty(reply.get("shape", 0), dtype=torch.uint8)
            _fill(child.socket, frames.numpy().data, time.monotonic() + self.timeout_seconds)
        except TimeoutError as error:
            self.close()
            raise DataError(
                f"{path}: was not decoded within {self.timeout_seconds:g} s: re-encode it, remove it, "
                "or raise data.decode_timeout_seconds."
            ) from error
        except (EOFError, ConnectionError) as error:
            child.process.join(5)
            code = child.process.exitcode
            self.close()
            if not child.is_ready and (code is None or code >= 0):
                # It ended by itself before it got a clip, and wrote the reason to stderr.
                raise RuntimeError(f"the decoder process did not start, exit code {code}") from error
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise DataError(f"{path}: the decoder died on it, {how}: re-encode it or remove it.") from error
        self._asked = None
        if "refused" in reply:
            raise DataError(reply["refused"])
        return reply, frames


class _Child:
    """A decoder process and the parent's end of the socket between them."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.process = child_context().Process(target=_serve, args=(theirs,), name="clip-decoder", daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False


def _serve(parent: socket.socket) -> None:
    """Runs in the child: answers one question after the other until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Imported now, so that no clip's time is spent on it.
    import av  # noqa: F401

    clips: Iterator[DecodedClip | DataError] = iter(())
    # The other side is gone: nobody is left to answer.
    with contextlib.suppress(EOFError, ConnectionError):
        _send(parent, {"ready": True})
        while True:
            message = _receive(parent, None)
            if "scan" in message:
                _send(parent, _scan(Path(message["scan"])))
                continue
            if "cut" in message:
                clips = _clips(Path(message["cut"]), [Cut(**values) for values in message["cuts"]])
            clip = next(clips)
            if isinstance(clip, DataError):
                _send(parent, {"refused": str(clip)})
            else:
                _send(parent, {"report": clip.report, "shape": list(clip.frames.shape)})
                parent.sendall(clip.frames.numpy().data.cast("B"))


def _scan(path: Path) -> dict:
    try:
        return {"values": scan_video(path).to_json()}
    except DataError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001  (one file's trouble, a bug included, is that file's)
        return {"refused": str(_unexpected(path, error))}


def _clips(path: Path, cuts: list[Cut]) -> Iterator[DecodedClip | DataError]:
    """Yields as `try_clips`; an exception that it does not expect refuses the rest of the file."""
    num_done = 0
    try:
        for clip in try_clips(path, cuts):
            yield clip
            num_done += 1
    except Exception as error:  # noqa: BLE001  (one file's trouble, a bug included, is that file's)
        for _ in cuts[num_done:]:
            yield _unexpected(path, error)


def _unexpected(path: Path, error: Exception) -> DataError:
    text = " ".join(str(error).split())[:300]
    return DataError(f"{path}: cannot be decoded ({type(error).__name__}: {text}): re-encode it or remove it.")


def _send(to: socket.socket, message: dict) -> None:
    """Sends a message: its length in 8 bytes, then JSON."""
    text = json.dumps(message).encode()
    to.sendall(len(text).to_bytes(8, "big") + text)


def _receive(source: socket.socket, deadline: float | None) -> dict:
    length = bytearray(8)
    _fill(source, memoryview(length), deadline)
    text = bytearray(int.from_bytes(length, "big"))
    _fill(source, memoryview(text), deadline)
    return json.loads(text)


def _fill(source: socket.socket, view: memoryview, deadline: float | None) -> None:
    """Reads until `view` is full; EOFError if the other side is gone, TimeoutError after `deadline` (monotonic)."""
    view = view.cast("B")
    while view:
        source.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        count = source.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]

"""Scans files and decodes clips in a child process, which may hang or die on a clip without ending the run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mochi_tune.data_prep.clips import Cut, DecodedClip, try_clips
from mochi_tune.data_prep.probe import Scan, scan_video
from mochi_tune.data_prep.watched import WatchedProcess, unexpected_error
from mochi_tune.errors import DataError


class ClipDecoder(WatchedProcess):
    """Scans and decodes files in a child process, which may hang or die on one of them without ending the run.

    Frames are received directly into the memory of the tensor that the caller gets. Any error on a file, a bug
    included, is a DataError for that file.

    Use as a context manager:
        with ClipDecoder(timeout_seconds=120) as decoder:
            scans = [decoder.scan(path) for path in paths]
            for path, index, clip in decoder.cut_all(jobs): ...

    Args:
        timeout_seconds: maximum time for one scan or one clip; then the child is killed.
    """

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(timeout_seconds, "data.decode_timeout_seconds")
        self._ahead: tuple[Path, list[Cut]] | None = None

    def close(self) -> None:
        """Kills the child, as `WatchedProcess.close`, and forgets the job that was begun ahead."""
        self._ahead = None
        super().close()

    def scan(self, path: Path) -> Scan:
        """Reads a file's properties as `scan_video` does.

        Raises:
            DataError: as `scan_video`; also when it takes longer than `timeout_seconds` or kills the child.
        """
        [values] = self.run(scan_file, path, {})
        return Scan.from_json(values)

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
        """Decodes clips in turn, the next one while the caller works on the current one.

        Args:
            jobs: files, each with its cuts as for `cut_clips`.
            ahead: the first job of the next call. It is begun while the caller works on the last clip of this one.

        Yields:
            For each cut in order: the path, the cut's index in its file, and the clip or the error that refuses it.
            When the child hangs or dies on a clip, the error also refuses the remaining cuts of its file.
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
                        self._request_cut(path, index, cuts)
                result = lost or self._receive_clip()
                # A child that was lost takes the file's remaining cuts with it.
                lost = result if isinstance(result, DataError) and self._child is None else None
                following = next(iter([*wanted[number + 1 : number + 2], *after]), None)
                if following is not None and (lost is None or following[1] == 0):
                    self._request_cut(*following)
                    if number + 1 == len(wanted):
                        self._ahead = following[0], list(following[2])
                yield path, index, result
        finally:
            if self._pending is not None and self._ahead is None:
                self.close()

    def _request_cut(self, path: Path, index: int, cuts: Sequence[Cut]) -> None:
        """Requests a file's first cut, or its next one."""
        if index:
            self._request_next(path)
        else:
            self._request_job(decode_cuts, path, {"cuts": [asdict(cut) for cut in cuts]})

    def _receive_clip(self) -> DecodedClip | DataError:
        try:
            values, frames = self._receive_result()
        except DataError as error:
            return error
        assert values is not None
        return DataError(values["refused"]) if "refused" in values else DecodedClip(torch.from_numpy(frames), **values)


def scan_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the values of a file's `Scan`; a job of `WatchedProcess`."""
    try:
        yield scan_video(path).to_json()
    except OSError as error:
        raise unexpected_error(path, error) from error


def decode_cuts(path: Path, cuts: list[dict[str, Any]]) -> Iterator[Any]:
    """Yields a result for each cut; a job of `WatchedProcess`.

    Args:
        path: of the file.
        cuts: values of each `Cut`.

    Yields:
        {"report": of the `DecodedClip`} with its frames, or {"refused": reason}. An unexpected error refuses this cut
        and the remaining ones.
    """
    num_done = 0
    try:
        for clip in try_clips(path, [Cut(**values) for values in cuts]):
            if isinstance(clip, DataError):
                yield {"refused": str(clip)}
            else:
                yield {"report": clip.report}, clip.frames.numpy()
            num_done += 1
    except Exception as error:  # noqa: BLE001  (any error, a bug included, refuses this file only)
        for _ in cuts[num_done:]:
            yield {"refused": str(unexpected_error(path, error))}

"""The tasks of a `prepare`, each the clips of a file or a caption, and the worker that encodes them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from mochi_tune.data.rows import CacheSettings
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.encode import encode_caption, encode_frames
from mochi_tune.data_prep.gather import Clip
from mochi_tune.data_prep.hashes import Signature, signature
from mochi_tune.data_prep.preview import write_preview
from mochi_tune.errors import DataError, ParallelError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import DTYPES, free_memory
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import WeightsPaths


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of every worker of a `prepare`; can be pickled.

    Attributes:
        weights: paths of the weights.
        cache: settings of the cache, with the fingerprints that the weights must have.
        parts: folder of encoded clips and captions.
        device: "cpu" or "cuda".
        decode_timeout_seconds: for `ClipDecoder`.
        num_threads: of torch; results may differ in bits with another number.
    """

    weights: WeightsPaths
    cache: CacheSettings
    parts: Path
    device: str
    decode_timeout_seconds: float
    num_threads: int


@dataclass(frozen=True)
class ClipTask:
    """The clips of one file, which is decoded once for all of them.

    Attributes:
        clips: by ascending start.
        before: the file's signature when it was hashed.
        is_missing: of each clip, whether its latents must be encoded.
        previews: of each clip, the file for its preview; None for no preview.
    """

    clips: tuple[Clip, ...]
    before: Signature
    is_missing: tuple[bool, ...]
    previews: tuple[Path | None, ...]

    @property
    def name(self) -> str:
        """The file's name, for errors."""
        return str(self.clips[0].file.path)

    @property
    def to_decode(self) -> tuple[Path, list]:
        """The file and its cuts, as `ClipDecoder.cut_all` takes them."""
        return self.clips[0].file.path, [clip.cut for clip in self.clips]


@dataclass(frozen=True)
class CaptionTask:
    """A caption: the key of its features, its text, and the name of the first clip that has it, for errors."""

    key: str
    caption: str
    name: str


Task = ClipTask | CaptionTask
AnyTask = TypeVar("AnyTask", ClipTask, CaptionTask)


class Store(Protocol):
    """Storage of encoded tensors: a `CacheWriter` in the main process, a `PartsFolder` in others."""

    def has_latents(self, clip_key: str, /) -> bool:
        """Whether a clip's latents are stored."""
        ...

    def has_text(self, text_key: str, /) -> bool:
        """Whether a caption's features are stored."""
        ...

    def put_latents(self, clip_key: str, mean: Any, logvar: Any, clip_report: dict[str, Any], /) -> object:
        """Saves a clip's posterior."""
        ...

    def put_text(self, text_key: str, prompt_embeds: Any, caption_tokens: int, /) -> object:
        """Saves a caption's features."""
        ...


class Worker:
    """Encodes tasks one after the other. Holds one model at a time, loaded when a task needs it.

    Args:
        settings: of the run.
        store: where the tensors go.
        decoder: of the clips.
        checks_weights: whether to compare the weights' fingerprints with those of the main process.
    """

    def __init__(self, settings: WorkerSettings, store: Store, decoder: ClipDecoder, checks_weights: bool) -> None:
        self.settings, self.store, self._decoder, self._checks_weights = settings, store, decoder, checks_weights
        self._saver, self._saving = ThreadPoolExecutor(1), None
        self._part, self._model = "", None

    def run(self, task: Task, ahead: Task | None = None, update: Callable[[], object] | None = None) -> list[str]:
        """Encodes a task. The last clip is on disk only after `finish`, or after the next clip.

        Args:
            task: to encode.
            ahead: the task of the next call, whose decoding begins early; None if unknown.
            update: called after each clip or caption.

        Returns:
            For a ClipTask why each clip is refused, "" if it is not; for a CaptionTask an empty list.

        Raises:
            DataError: the model returned NaN or infinity, or ran out of memory.
            ParallelError: the weights differ from those of the main process.
            OSError: writing failed.
        """
        update = update or (lambda: None)
        if isinstance(task, ClipTask):
            reasons = []
            for reason in self._encode_clips(task, ahead.to_decode if isinstance(ahead, ClipTask) else None):
                reasons.append(reason)
                update()
            return reasons
        if not self.store.has_text(task.key):
            # In memory.t5_dtype, not model.dtype: features are computed once, and rounding affects all of training.
            model = self._load("text_encoder")
            self.store.put_text(task.key, *encode_caption(model, task.caption, task.name))
        update()
        return []

    def finish(self) -> None:
        """Waits until everything that was encoded is on disk."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits for the last save, ends the saving thread and frees the model."""
        self._saver.shutdown()
        self._part, self._model = "", None
        free_memory()

    def _encode_clips(self, task: ClipTask, ahead: tuple[Path, list] | None) -> Iterator[str]:
        decoded_clips = self._decoder.cut_all([task.to_decode], ahead)
        each = zip(task.clips, task.is_missing, task.previews, decoded_clips, strict=True)
        for clip, is_missing, preview, (_, _, decoded) in each:
            if isinstance(decoded, DataError):
                yield str(decoded)
                continue
            if not _is_unchanged(clip, task.before):
                yield f"{clip.file.path}: was changed while it was read: run the same command again."
                continue
            if preview is not None:
                write_preview(preview, decoded.frames)
            if is_missing and not self.store.has_latents(clip.row.clip_key):
                # The model is loaded only here, so that a second run over refused clips reads no weights.
                mean, logvar = encode_frames(self._load("encoder"), decoded.frames, clip.row.sample_id)
                # Save one clip while the next one is encoded: a sync to disk takes a while.
                self.finish()
                self._saving = self._save(clip.row.clip_key, mean, logvar, decoded.report)
            yield ""

    def _save(self, *latents: Any) -> "Future[object]":
        return self._saver.submit(self.store.put_latents, *latents)

    def _load(self, part: str) -> Any:
        """Returns the encoder or the text encoder, and frees the other one."""
        if self._part == part:
            return self._model
        self._part, self._model = "", None
        free_memory()
        weights, settings = WeightsFolder(self.settings.weights), self.settings.cache
        if self._checks_weights:
            expected, found = settings.vae if part == "encoder" else settings.t5, weights.fingerprint(part)
            if found != expected:
                raise ParallelError(
                    f"the weights of the {part} in {self.settings.weights.root} are {found[:16]}… in a worker and "
                    f"{expected[:16]}… in the main process: give each process and machine the same files."
                )
        if part == "encoder":
            self._model = weights.load_encoder(torch.device(self.settings.device), DTYPES[settings.vae_dtype])
        else:
            self._model = weights.load_text_encoder(torch.device(self.settings.device), T5_DTYPES[settings.t5_dtype])
        self._part = part
        return self._model


class WorkHere:
    """Encodes in this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __enter__(self) -> "WorkHere":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def run(self, tasks: Sequence[AnyTask], update: Callable[[], object]) -> Iterator[tuple[AnyTask, list[str]]]:
        """Yields each finished task with the result of `Worker.run`; calls `update` after each clip or caption."""
        for number, task in enumerate(tasks):
            ahead = tasks[number + 1] if number + 1 < len(tasks) else None
            yield task, self._worker.run(task, ahead, update)
        self._worker.finish()


def _is_unchanged(clip: Clip, before: Signature) -> bool:
    """Whether a video still has the content from which its clip_key was computed."""
    try:
        # Compare signatures first: hashing a long file for each of its clips would be slow.
        return signature(clip.file.path) == before or file_sha256(clip.file.path) == clip.row.source_sha256
    except (OSError, DataError):
        return False

"""Writes the exact frames of clips that the VAE gets to video files, for inspection."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mochi_tune.errors import ConfigError, printable
from mochi_tune.files import temporary_file
from mochi_tune.models.latents import FPS

# Marks previews in the file's metadata; Matroska stores the field under this name.
_MARK, _MARKED_BY = "mochi-tune preview", "COMMENT"


def preview_paths(folder: Path, clips: Sequence[tuple[str, int]]) -> list[Path]:
    """Returns the file of each clip: its video's path as .mkv, with @START unless the clip starts at frame 0.

    Videos that differ only in their suffix keep it, as in a.mp4.mkv.

    Args:
        folder: of the previews.
        clips: of each clip, its video's path and its first frame.
    """
    videos = {Path(video) for video, _ in clips}
    stems = Counter(video.with_suffix("") for video in videos)
    paths = []
    for video, start in [(Path(video), start) for video, start in clips]:
        name = video.name if stems[video.with_suffix("")] > 1 else video.stem
        paths.append(folder / video.with_name(f"{name}{f'@{start}' if start else ''}.mkv"))
    return paths


def check_preview_folder(folder: Path, sources: Sequence[Path]) -> None:
    """Refuses a folder of previews that overlaps with a folder of videos, or is a file.

    Raises:
        ConfigError: they overlap, so that previews would be trained on or replace videos; or no folder can be there.
    """
    if file := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"data.preview={folder}: {file} is a file: name a folder.")
    for source in sources:
        ours, theirs = folder.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ConfigError(
                f"data.preview={folder} overlaps with the videos in {source}, which would be overwritten or trained "
                "on: use another folder."
            )


def write_preview(path: Path, frames: Tensor) -> None:
    """Writes uint8 frames (F, H, W, 3) as lossless FFV1 in RGB at 30 fps, atomically.

    It replaces an earlier preview. Any other file of that name is kept, with a warning.
    """
    import av

    if path.exists() and not _is_preview(path):
        tqdm.write(printable(f"no preview was written: {path} exists and is not a preview: move it away"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as temporary:
        with av.open(f"file:{temporary}", "w", format="matroska") as container:
            container.metadata[_MARKED_BY] = _MARK
            stream = container.add_stream("ffv1", rate=FPS)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "bgr0"
            stream.time_base = Fraction(1, FPS)
            for number, frame in enumerate(frames.numpy()):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
                picture.pts = number
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        temporary.replace(path)


def _is_preview(path: Path) -> bool:
    import av
    from av.error import FFmpegError

    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            return container.metadata.get(_MARKED_BY) == _MARK
    except (FFmpegError, OSError):
        # Not a readable video, so not a preview.
        return False

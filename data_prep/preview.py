"""Writes clips as the VAE gets them, frame for frame, for people and scripts to look at."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mochi_tune.errors import ConfigError, printable
from mochi_tune.files import temporary_file
from mochi_tune.models.latents import FPS

# In the file's metadata, by the name that Matroska gives it.
MARK, MARKED_BY = "mochi-tune preview", "COMMENT"


def preview_paths(folder: Path, clips: Sequence[tuple[str, int]]) -> list[Path]:
    """Returns the file of each clip: its video's path as .mkv, with the clip's @START where it is not the first.

    Two videos that differ in their suffix alone keep it, as in a.mp4.mkv.

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
    """Refuses a folder of previews that overlaps with a folder of videos.

    Raises:
        ConfigError: previews would be trained on, or take the place of videos.
    """
    for source in sources:
        ours, theirs = folder.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ConfigError(
                f"data.preview={folder} overlaps with the videos in {source}, which would be overwritten or trained "
                "on: use a folder of its own."
            )


def write_preview(path: Path, frames: Tensor) -> None:
    """Writes uint8 frames (F, H, W, 3) as lossless FFV1 in RGB at 30 fps; the file appears when it is complete.

    It takes the place of another preview; any other file of the name stays, and is told.
    """
    import av

    if path.exists() and not _is_preview(path):
        tqdm.write(printable(f"no preview is written: {path} is there and has no mark of one: move it away"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as temporary:
        with av.open(str(temporary), "w", format="matroska") as container:
            container.metadata[MARKED_BY] = MARK
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
        with av.open(str(path), metadata_errors="replace") as container:
            return container.metadata.get(MARKED_BY) == MARK
    except (FFmpegError, OSError):
        # It is no video, or not to be read: so it is no preview either.
        return False

"""Writes clips as the VAE gets them, frame for frame, for people and scripts to look at."""

from fractions import Fraction
from pathlib import Path

from torch import Tensor

from mochi_tune.files import temporary_file
from mochi_tune.models.latents import FPS


def preview_path(folder: Path, sample_id: str) -> Path:
    """Returns the file of a clip: its video's path as .mkv, with the clip's @START where it has one."""
    path, at, start = sample_id.rpartition("@")
    is_window = bool(at) and start.isdigit()
    name = Path(path if is_window else sample_id)
    return folder / name.with_name(f"{name.stem}{f'@{start}' if is_window else ''}.mkv")


def write_preview(path: Path, frames: Tensor) -> None:
    """Writes uint8 frames (F, H, W, 3) as lossless FFV1 in RGB at 30 fps; the file appears when it is complete."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as temporary:
        with av.open(str(temporary), "w", format="matroska") as container:
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

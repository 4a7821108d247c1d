"""The formats of video files: their codecs and qualities, and the checks of the settings that choose them."""

from dataclasses import dataclass
from pathlib import Path

from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError

# The codecs of each format, the default first. Formats without a codec are written by Pillow.
FORMATS = {"mp4": ("h264", "hevc", "av1"), "webm": ("vp9", "av1"), "gif": (), "webp": (), "png": ()}

# Browsers show a frame of a GIF that is shorter than 20 ms for 100 ms.
FASTEST_GIF = 50


@dataclass(frozen=True)
class Codec:
    """A video codec.

    Attributes:
        encoder: name in FFmpeg.
        crf: range of the constant rate factor, best quality first.
        default_crf: default. On the tests' clip, the PSNR of all codecs is within 0.3 dB of H.264 at 17.
    """

    encoder: str
    crf: tuple[int, int]
    default_crf: int


# SVT-AV1 is the only AV1 encoder in PyAV's wheels; it has neither a lossless mode nor 4:4:4 there.
CODECS = {
    "h264": Codec("libx264", (0, 51), 17),
    "hevc": Codec("libx265", (0, 51), 16),
    "vp9": Codec("libvpx-vp9", (0, 63), 16),
    "av1": Codec("libsvtav1", (1, 63), 16),
}


@dataclass(frozen=True)
class Encoding:
    """The format and codec of a video file.

    Attributes:
        format: one of FORMATS.
        codec: one of CODECS; None if Pillow writes the format.
        crf: constant rate factor of the codec; 0 is lossless, in 4:4:4.
    """

    format: str = "mp4"
    codec: str | None = "h264"
    crf: int | None = CODECS["h264"].default_crf

    @property
    def is_lossless(self) -> bool:
        """Whether the codec is lossless, except for the rounding of the colour conversion."""
        return self.crf == 0


MP4, PNG = Encoding(), Encoding("png", None, None)


def encoding_of(path: Path) -> Encoding:
    """Returns the default encoding of a file's suffix.

    Raises:
        ConfigError: no format has this suffix.
    """
    name = path.suffix.lower().removeprefix(".")
    if name not in FORMATS:
        raise ConfigError(f"{path}: no format has this suffix: use {', '.join(f'.{each}' for each in FORMATS)}.")
    codec = next(iter(FORMATS[name]), None)
    return Encoding(name, codec, None if codec is None else CODECS[codec].default_crf)


def choose_encoding(sample: SampleConfig, num_frames: int) -> Encoding:
    """Returns the encoding of a video: by `format` or the suffix of `out`, else PNG for one frame and MP4 for more.

    Raises:
        ConfigError: the settings contradict each other, or the installed PyAV lacks the encoder.
    """
    suffix = _suffix_of(sample.out)
    if sample.format and suffix and suffix != sample.format:
        raise ConfigError(f"out={sample.out} is not a {sample.format} file: leave sample.format out, or rename out.")
    name = sample.format or suffix or ("png" if num_frames == 1 else "mp4")
    if suffix == "png" and num_frames > 1:
        raise ConfigError(
            f"out={sample.out} is one picture, but {num_frames} frames are requested: use num_frames=1, or "
            "format=png with a folder as out=."
        )
    if name == "gif" and sample.fps > FASTEST_GIF:
        raise ConfigError(f"sample.fps={sample.fps:g} is not for gif: use at most {FASTEST_GIF}, or webp or mp4.")
    if not FORMATS[name]:
        for key in ("codec", "crf"):
            if getattr(sample, key) is not None:
                raise ConfigError(f"sample.{key}={getattr(sample, key)} has no meaning for {name}: leave it out.")
        return Encoding(name, None, None)
    codec = sample.codec or FORMATS[name][0]
    if codec not in FORMATS[name]:
        raise ConfigError(f"sample.codec={codec} is not for {name}: use {' or '.join(FORMATS[name])}.")
    lowest, highest = CODECS[codec].crf
    crf = CODECS[codec].default_crf if sample.crf is None else sample.crf
    if not lowest <= crf <= highest:
        lossless = "" if lowest == 0 else "; lossless are h264, hevc and vp9 with crf=0, format=png and format=webp"
        raise ConfigError(f"sample.crf={crf} does not fit {codec}: use {lowest} (best) to {highest}{lossless}.")
    _check_encoder(codec)
    return Encoding(name, codec, crf)


def is_file_name(path: Path) -> bool:
    """Whether a path names a file and not a folder; "v1.5" is a folder."""
    return not path.is_dir() and path.suffix[1:2].isalpha()


def _suffix_of(out: str | None) -> str | None:
    """Returns the format by the suffix of a file's name; None if `out` is a folder or not set."""
    path = Path(out or "")
    if not is_file_name(path):
        return None
    if path.suffix[1:] not in FORMATS:
        *names, last = (f".{name}" for name in FORMATS)
        raise ConfigError(f"out={out} has an unknown suffix: use {', '.join(names)} or {last}, or name a folder.")
    return path.suffix[1:]


def _check_encoder(codec: str) -> None:
    import av

    if CODECS[codec].encoder not in av.codecs_available:
        raise ConfigError(
            f"sample.codec={codec} needs the encoder {CODECS[codec].encoder}, which PyAV {av.__version__} here lacks: "
            "install PyAV's own wheel (pip install --only-binary av --force-reinstall av), or use another codec."
        )

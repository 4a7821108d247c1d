"""Exports an adapter file to the format of another program."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_tune.adapters.files import DTYPES, Adapter, LoraLayer, check_format, load_adapter, save_adapter
from mochi_tune.errors import ConfigError, printable
from mochi_tune.training.records import find_run_dir, run_date


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        file: the new file.
        to: its format.
        num_layers: adapted modules in the file, zeros that the format demands included.
        trained_rank: as in the source; "4,8" where layers differ.
        rank: in the new file; larger than trained where ranks were padded, or where split q, k, v were fused.
        alpha: in the new file.
        dtype: "fp32", "bf16" or "fp16".
        error: what the rounding to the dtype changed, see `rounding_error`.
        source_note: the source, its alpha, and where that was found.
    """

    file: Path
    to: str
    num_layers: int
    trained_rank: str
    rank: str
    alpha: str
    source_note: str
    dtype: str = "fp32"
    error: float = 0.0

    def __str__(self) -> str:
        trained = "" if self.rank == self.trained_rank else f" (trained at {self.trained_rank})"
        rounded = "" if self.dtype == "fp32" else f", {self.dtype}, a relative error of {self.error:.1e} by rounding"
        return (
            f"{self.file}: {self.to}, {self.num_layers} layers, rank {self.rank}{trained}, alpha {self.alpha}{rounded}"
        )


def main(
    adapter: Path | str,
    to: str,
    out: Path,
    dtype: str = "fp32",
    about: Mapping[str, str] | None = None,
    adapter_alpha: float | None = None,
) -> ExportSummary:
    """Converts the adapter file `adapter` to the format `to` and writes it to the new file `out`.

    Args:
        adapter: a file, a folder or hub:OWNER/NAME, as `find_adapter_file` takes it.
        to: one of `adapters.files.FORMATS`.
        out: the new file, *.safetensors.
        dtype: of its tensors: "fp32", "bf16" or "fp16".
        about: ModelSpec's "title", "author", "license" and "trigger_phrase", in place of those that the adapter states.
        adapter_alpha: of a source that does not state its own.

    Raises:
        ConfigError: `to` or `dtype` is unknown, or `out` exists, is no .safetensors name or has no possible folder.
        CheckpointError: the adapter cannot be read, or has no place in the format or the dtype.
    """
    out = Path(out)
    check_format(to)
    check_dtype(dtype)
    if out.suffix != ".safetensors":
        raise ConfigError(f"out={out} must end in .safetensors: use {out.stem or 'adapter'}.safetensors.")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={out} exists, and an export never overwrites: choose another name or remove it.")
    source = read_source(adapter, about or {}, adapter_alpha)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: its folder cannot be made ({error.strerror}): choose another one.") from error
    return write(source, to, out, dtype)


def check_dtype(dtype: str) -> None:
    """Refuses a dtype that no export has.

    Raises:
        ConfigError: it is not "fp32", "bf16" or "fp16".
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not possible: use {', '.join(DTYPES)}.")


def read_source(adapter: Path | str, about: Mapping[str, str], adapter_alpha: float | None = None) -> Adapter:
    """Loads an adapter and adds what is said about it; the date is that of its run, where that is known.

    Args:
        adapter: in any format.
        about: ModelSpec's keys without the prefix, and their values; empty ones are left out.

    Raises:
        CheckpointError: the adapter cannot be read.
    """
    source = load_adapter(adapter, adapter_alpha)
    assert source.path is not None, "it was loaded from a file"
    run_dir = find_run_dir(source.path)
    date = run_date(run_dir) if run_dir else ""
    defaults = {"title": source.metadata.get("name") or source.path.stem, "date": date}
    for facts, is_default in ((defaults, True), (about, False)):
        for key, value in facts.items():
            if value and not (is_default and source.metadata.get(f"modelspec.{key}")):
                source.metadata[f"modelspec.{key}"] = value
    return source


def write(source: Adapter, to: str, out: Path, dtype: str) -> ExportSummary:
    """Writes a loaded adapter to `out`, whose folder exists.

    Raises:
        CheckpointError: it has no place in the format or the dtype.
    """
    layers = save_adapter(out, source, to, DTYPES[dtype])
    ranks = sorted({layer.rank for layer in layers.values()})
    alphas = sorted({layer.alpha for layer in layers.values()})
    return ExportSummary(
        file=out,
        to=to,
        num_layers=len(layers),
        trained_rank=printable(source.metadata["rank"]),
        rank=",".join(map(str, ranks)),
        alpha=",".join(f"{alpha:g}" for alpha in alphas),
        source_note=f"{source}, {source.alpha_note}",
        dtype=dtype,
        error=rounding_error(layers, DTYPES[dtype]),
    )


def rounding_error(layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> float:
    """Returns how far rounding moves the change of the weights, relative to its size.

    It is the Frobenius norm of the difference over that of the change, both over all layers. Where there are
    magnitudes, theirs counts if it is larger.
    """
    squares = torch.zeros(4, dtype=torch.float64)
    for layer in layers.values():
        a, b = layer.a.double(), layer.b.double() * layer.scale
        rounded_a, rounded_b = layer.a.to(dtype).double(), layer.b.to(dtype).double() * layer.scale
        # B'A' - BA as one product of twice the rank.
        squares[0] += _squared_norm(torch.cat([rounded_b, -b], dim=1), torch.cat([rounded_a, a]))
        squares[1] += _squared_norm(b, a)
        if layer.magnitude is not None:
            exact = layer.magnitude.double()
            squares[2] += (layer.magnitude.to(dtype).double() - exact).square().sum()
            squares[3] += exact.square().sum()
    change, magnitudes = ((squares[i] / squares[i + 1].clamp(min=1e-300)).sqrt().item() for i in (0, 2))
    return max(change, magnitudes)


def _squared_norm(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Returns the squared Frobenius norm of b @ a, which is not formed: it can be a thousand times larger."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)

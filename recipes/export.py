"""Exports an adapter file to the format of another program."""

from dataclasses import dataclass
from pathlib import Path

from mochi_tune.errors import ConfigError


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
        source_note: the source, its alpha, and where that was found.
    """

    file: Path
    to: str
    num_layers: int
    trained_rank: str
    rank: str
    alpha: str
    source_note: str

    def __str__(self) -> str:
        trained = "" if self.rank == self.trained_rank else f" (trained at {self.trained_rank})"
        return f"{self.file}: {self.to}, {self.num_layers} layers, rank {self.rank}{trained}, alpha {self.alpha}"


def main(adapter: Path | str, to: str, out: Path, adapter_alpha: float | None = None) -> ExportSummary:
    """Converts the adapter `adapter` to the format `to` and writes it to the new file `out`.

    Args:
        adapter: a file, a folder or hub:OWNER/NAME, as `find_adapter_file` takes it.
        to: one of the formats.
        out: the new file.
        adapter_alpha: of a source that does not state its own.

    Raises:
        ConfigError: `to` is unknown, or `out` exists, is no .safetensors name or has no possible folder.
        CheckpointError: the adapter cannot be read, or has no place in the format.
    """
    from mochi_tune.adapters.files import check_format, load_adapter, save_adapter

    out = Path(out)
    check_format(to)
    if out.suffix != ".safetensors":
        raise ConfigError(f"out={out} must end in .safetensors: use {out.stem or 'adapter'}.safetensors.")
    if out.exists():
        raise ConfigError(f"out={out} exists, and an export never overwrites: choose another name or remove it.")

    source = load_adapter(adapter, adapter_alpha)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: its folder cannot be made ({error.strerror}): choose another one.") from error
    layers = save_adapter(out, source, to).values()

    ranks = sorted({layer.rank for layer in layers})
    alphas = sorted({layer.alpha for layer in layers})
    return ExportSummary(
        file=out,
        to=to,
        num_layers=len(layers),
        trained_rank=source.metadata["rank"],
        rank=",".join(map(str, ranks)),
        alpha=",".join(f"{alpha:g}" for alpha in alphas),
        source_note=f"{source}, {source.alpha_note}",
    )

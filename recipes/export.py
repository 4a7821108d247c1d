"""Exports an adapter file to the format of another program."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_tune.adapters.alphas import BAKED
from mochi_tune.adapters.files import DTYPES, Adapter, LoraLayer, check_format, lay_out, load_adapter
from mochi_tune.adapters.notes import layer_bar
from mochi_tune.errors import ConfigError, printable
from mochi_tune.files import save_tensors
from mochi_tune.recipes.new_output import check_new_file, make_parent
from mochi_tune.training.records import find_run_dir, run_date


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        file: the new file.
        to: its format.
        trained_layers: number of layers of the source, by their official names.
        num_layers: number of adapted modules in the file, including zeros that the format requires.
        trained_rank: rank of the source; "4,8" if layers differ.
        rank: rank in the new file; higher than the trained one if ranks were padded or separate q, k, v were fused.
        trained_alpha: alpha of the source; "4,8" if layers differ.
        alpha: alpha in the new file, or of its layers if the format has no alpha.
        source_note: the source, its alpha and where the alpha was found.
        dtype: "fp32", "bf16" or "fp16".
        error: relative error of the rounding to `dtype`, see `rounding_error`.
    """

    file: Path
    to: str
    trained_layers: int
    num_layers: int
    trained_rank: str
    rank: str
    trained_alpha: str
    alpha: str
    source_note: str
    dtype: str = "fp32"
    error: float = 0.0

    def __str__(self) -> str:
        trained = "" if self.rank == self.trained_rank else f" (trained at {self.trained_rank})"
        rounded = "" if self.dtype == "fp32" else f", {self.dtype}, a relative error of {self.error:.1e} by rounding"
        layers = f"{self.trained_layers} layers"
        if self.num_layers != self.trained_layers:
            layers += f" ({self.num_layers} in the {self.to} format)"
        # The other formats state an alpha.
        is_folded = self.to in BAKED and self.alpha != self.trained_alpha
        alpha, folded = f", alpha {self.alpha}", f"; alpha {self.trained_alpha} is folded into the weights"
        return (
            f"{self.file}: {self.to}, {layers}, rank {self.rank}{trained}{'' if is_folded else alpha}{rounded}"
            f"{folded if is_folded else ''}"
        )


def main(
    adapter: Path | str,
    to: str,
    out: Path,
    dtype: str = "fp32",
    about: Mapping[str, str] | None = None,
    adapter_alpha: float | None = None,
) -> ExportSummary:
    """Converts an adapter file to another format.

    Args:
        adapter: a file, a folder or hub:OWNER/NAME, see `find_adapter_file`.
        to: one of `adapters.files.FORMATS`.
        out: new .safetensors file.
        dtype: dtype of the tensors: "fp32", "bf16" or "fp16".
        about: ModelSpec's "title", "author", "license" and "trigger_phrase", which replace those of the adapter.
        adapter_alpha: alpha of a source that states none.

    Raises:
        ConfigError: `to` or `dtype` is unknown, or `out` exists, has another suffix or its folder cannot be made.
        CheckpointError: the adapter cannot be read, or does not fit the format or the dtype.
    """
    out = Path(out)
    check_format(to)
    check_dtype(dtype)
    check_new_file(out, ".safetensors")
    source = read_source(adapter, about or {}, adapter_alpha)
    make_parent(out)
    return write(source, to, out, dtype)


def check_dtype(dtype: str) -> None:
    """Refuses a dtype that exports do not have.

    Raises:
        ConfigError: `dtype` is not "fp32", "bf16" or "fp16".
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not possible: use {', '.join(DTYPES)}.")


def read_source(adapter: Path | str, about: Mapping[str, str], adapter_alpha: float | None = None) -> Adapter:
    """Loads an adapter and sets its ModelSpec metadata; the date is that of its run, if that is known.

    Args:
        adapter: a file in any format, a folder or hub:OWNER/NAME.
        about: ModelSpec's keys without the prefix, and their values; empty values are ignored.
        adapter_alpha: alpha of a source that states none.

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
    """Writes a loaded adapter to a file; the folder of `out` exists.

    Raises:
        CheckpointError: the adapter does not fit the format or the dtype.
    """
    layers, tensors, metadata = lay_out(source, to, DTYPES[dtype])
    # It takes a minute at a high rank. The file takes its name last, so that an interrupted export leaves none.
    error = rounding_error(layers, DTYPES[dtype])
    save_tensors(out, tensors, metadata, durable=True)
    ranks = sorted({layer.rank for layer in layers.values()})
    alphas = sorted({layer.alpha for layer in layers.values()})
    return ExportSummary(
        file=out,
        to=to,
        trained_layers=len(source.layers),
        num_layers=len(layers),
        trained_rank=printable(source.metadata["rank"]),
        rank=",".join(map(str, ranks)),
        trained_alpha=source.alpha,
        alpha=",".join(f"{alpha:g}" for alpha in alphas),
        source_note=f"{source}, {source.alpha_note}",
        dtype=dtype,
        error=error,
    )


def rounding_error(layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> float:
    """Returns the relative error of the change of the weights after rounding to `dtype`.

    It is the Frobenius norm of the difference divided by that of the change, both over all layers. For a DoRA it is
    the same of the magnitudes if that is larger.
    """
    squares = torch.zeros(4, dtype=torch.float64)
    held = [tensor for each in layers.values() for tensor in (each.a, each.b, each.magnitude) if tensor is not None]
    if all(tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in held):
        return 0.0
    for name in layer_bar("rounding error", layers):
        layer = layers[name]
        squares[:2] += _squared_norms(layer, dtype)
        if layer.magnitude is not None:
            exact = layer.magnitude.double()
            squares[2] += (layer.magnitude.to(dtype).double() - exact).square().sum()
            squares[3] += exact.square().sum()
    change, magnitudes = ((squares[i] / squares[i + 1].clamp(min=1e-300)).sqrt().item() for i in (0, 2))
    return max(change, magnitudes)


def _squared_norms(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    """Returns the squared Frobenius norms of B'A' - BA and of BA, where A' and B' are rounded.

    With A' = A + E and B' = B + F, the difference is BE + FA'. Its norm and that of BA follow from products of the
    halves, which are of the size of the rank: no product of a Linear's size is computed. BA takes fp64, because its
    parts can cancel. The parts of the difference do not: fp32, in which E and F are exact, is enough.
    """
    # The split q, k and v of a fused file have components that are 0 in one half.
    used = layer.a.any(dim=1) & layer.b.any(dim=0)
    a, b = layer.a[used].float(), layer.b[:, used].float()
    e, f = a.to(dtype).float() - a, b.to(dtype).float() - b
    aa, bb = a.double() @ a.double().T, b.double().T @ b.double()
    ee, ea, ff, bf = (product.double() for product in (e @ e.T, e @ a.T, f.T @ f, b.T @ f))
    rounded_aa, e_rounded_a = aa + ea + ea.T + ee, ea + ee
    difference = (bb * ee).sum() + 2 * (bf * e_rounded_a).sum() + (ff * rounded_aa).sum()
    return torch.stack([difference, (bb * aa).sum()]).clamp(min=0) * layer.scale**2

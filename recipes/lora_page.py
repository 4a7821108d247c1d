"""Makes a self-contained HTML page of the result of `mochi-tune lora inspect`."""

import math
from html import escape

from mochi_tune.adapters.tools import LayerFacts, block_and_kind
from mochi_tune.pages.html_page import Head, document, scrollable, section
from mochi_tune.recipes.lora_tools import Inspection

# Size of a chart and space for the numbers of its axes, in pixels.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 354, 150, 44, 18, 8
# Maximum number of block numbers on the axis of a chart.
_MAX_LABELS = 6
_STYLE = """
.bar{fill:var(--accent)}svg text{fill:var(--soft)}svg line{stroke:var(--rule)}
.scroll{max-height:36rem;overflow:auto;border:1px solid var(--rule);border-radius:6px}
table{width:100%;border-collapse:collapse;font-size:.85rem;line-height:1.4;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;border-top:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:first-child>*{border-top:0}th{color:var(--soft);font-weight:600}
table.words td{white-space:normal;text-align:left;overflow-wrap:anywhere}table.words td:first-child{white-space:nowrap}
h1{overflow-wrap:anywhere}
@media(max-width:30rem){th,td{padding:.35rem}}
@media print{.scroll{max-height:none}}
"""


def make_page(found: Inspection) -> str:
    """Returns the page: charts of the norm of each layer's change, a table of the layers, and the metadata."""
    name = found.adapter.path.name if found.adapter.path else "adapter"
    kinds: dict[str, dict[int, LayerFacts]] = {}
    for layer, facts in found.layers.items():
        block, kind = block_and_kind(layer)
        if block is not None:
            kinds.setdefault(kind, {})[block] = facts
    highest = max(facts.norm for facts in found.layers.values())
    num_blocks = 1 + max((block for blocks in kinds.values() for block in blocks), default=0)
    charts = "".join(_chart(kind, kinds[kind], num_blocks, highest) for kind in sorted(kinds))
    what = "the change before the DoRA scales the rows" if found.adapter.is_dora else "the change ΔW"
    note = f"The Frobenius norm of {what} in each block, on one scale for all kinds of layers."
    if outside := [layer for layer in found.layers if block_and_kind(layer)[0] is None]:
        note += f" {len(outside)} layers outside the blocks are in the table below only."
    content = [
        section("Change by block and kind of layer", note, f'<div class="charts">{charts}</div>'),
        section(
            "Layers",
            "The last two columns are the effective ranks: how many components hold 90\u00a0% and 99\u00a0% of the "
            "energy, which is the sum of the squared singular values.",
            _layers(found.layers),
        ),
        section("Metadata", f"Alphas are {found.alpha_words}.", _metadata(found)),
    ]
    summary = f"What this adapter file changes. Its sha256 is {found.sha256[:16]}…"
    return document(Head(name, summary, _figures(found)), _STYLE, "\n".join(content))


def _figures(found: Inspection) -> dict[str, tuple[str, str]]:
    facts = list(found.layers.values())
    total = math.hypot(*(each.norm for each in facts))
    kept = sum(each.rank_99 for each in facts)
    used = sum(each.rank for each in facts)
    return {
        "layers": (str(len(facts)), "Linears that it changes" + (", as a DoRA" if found.adapter.is_dora else "")),
        "rank": (_span([each.rank for each in facts]), "components of a layer"),
        "alpha": (_span([each.alpha for each in facts]), "a layer is scaled by alpha / rank"),
        "norm of ΔW": (f"{total:.3g}", "of all layers together"),
        "rank in use": (f"{kept / used:.0%}", "of the components hold 99 % of each layer's energy"),
    }


def _span(values: list) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _chart(kind: str, blocks: dict[int, LayerFacts], num_blocks: int, highest: float) -> str:
    """Returns a bar chart with one bar for each block that has a layer of this kind."""
    pitch = (_WIDTH - _LEFT) / num_blocks
    bottom = _HEIGHT - _BOTTOM
    drawn = ""
    for value in (0.0, highest / 2, highest):
        y = bottom - (bottom - _TOP) * (value / highest if highest else 0)
        drawn += f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        drawn += f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>'
    for block, facts in blocks.items():
        height = (bottom - _TOP) * (facts.norm / highest if highest else 0)
        title = f"block {block}: norm {facts.norm:.3g}, effective rank {facts.rank_90} (90 %), {facts.rank_99} (99 %)"
        drawn += (
            f'<rect class="bar" x="{_LEFT + pitch * (block + 0.1):.1f}" y="{bottom - height:.1f}" '
            f'width="{min(pitch * 0.8, 40):.1f}" height="{height:.1f}"><title>{title}</title></rect>'
        )
    step = max(1, math.ceil(num_blocks / _MAX_LABELS))
    for block in range(0, num_blocks, step):
        x = _LEFT + pitch * (block + 0.1) + min(pitch * 0.8, 40) / 2
        drawn += f'<text x="{x:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{block}</text>'
    return (
        f'<figure><h3>{escape(kind)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="norm of the change of {escape(kind)} in each block">{drawn}</svg></figure>'
    )


def _layers(layers: dict[str, LayerFacts]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("layer", "rank", "alpha", "norm", "90 %", "99 %"))
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{each.rank}</td><td>{each.alpha:g}</td><td>{each.norm:.4g}</td>"
        f"<td>{each.rank_90}</td><td>{each.rank_99}</td></tr>"
        for name, each in layers.items()
    )
    return scrollable("Layers", f"<table><tr>{head}</tr>{rows}</table>")


def _metadata(found: Inspection) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>"
        for key, value in sorted(found.adapter.metadata.items())
    )
    return scrollable("Metadata", f'<table class="words">{rows}</table>')

"""Builds the page of `mochi-tune filter`, a single HTML file."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from mochi_tune.data_prep.histograms import Axis, histogram
from mochi_tune.pages.html_page import Head, data_uri, document, section

if TYPE_CHECKING:
    from mochi_tune.data_prep.filter import Judged

# Maximum number of flagged clips with pictures; the rest is in the table.
MAX_PICTURES = 200
_STYLE = """
:root{--warn:#a3480a}@media(prefers-color-scheme:dark){:root{--warn:#f0a35e}}
.bar{fill:var(--accent)}.bar.out{fill:var(--warn)}svg .axis{stroke:var(--rule)}
svg line.limit{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:4 3}svg text.limit{fill:var(--warn);font-weight:600}
.clips{display:grid;gap:1.8rem 1.4rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,16rem),1fr))}
.clips figure{display:flex;flex-direction:column;min-width:0}
.clips .pair{display:flex;align-items:flex-start;gap:4px;min-height:2rem}
.clips img{display:block;max-width:calc(50% - 2px);max-height:86px;border-radius:3px;object-fit:contain}
.clips h3{margin:.5rem 0 0;overflow-wrap:anywhere}.clips b{color:var(--warn);font-weight:600}
.clips figcaption{overflow-wrap:anywhere}
ul{margin:0;padding-left:1.2rem;max-width:80ch}li{overflow-wrap:anywhere}
"""


def make_page(
    judged: Sequence["Judged"], limits: Mapping[str, float | None], name: str, pictures: Mapping[str, bytes]
) -> str:
    """Returns the HTML of the page.

    Args:
        judged: the clips.
        limits: the values of `FilterLimits`.
        name: of the folder.
        pictures: JPEG of each clip, by name.
    """
    note = "The distribution of each score. Clips beyond a dashed line are flagged; each limit is a setting."
    content = [section("Scores", note, f'<div class="charts">{_charts(judged, limits)}</div>')]
    if unreadable := [each for each in judged if each.scores is None]:
        reasons = "".join(f"<li>{escape(each.reason)}</li>" for each in unreadable)
        content.append(section("Unreadable", "These clips could not be measured.", f"<ul>{reasons}</ul>"))
    flagged = [each for each in judged if each.flags and each.scores is not None]
    if flagged:
        rest = len(flagged) - MAX_PICTURES
        note = "The middle frame of each clip; next to a duplicate, the clip that is kept."
        note += f" {rest} more are in the table." if rest > 0 else ""
        clips = "".join(_clip(each, pictures) for each in flagged[:MAX_PICTURES])
        content.append(section("Flagged", note, f'<div class="clips">{clips}</div>'))
    num_good = sum(not each.flags for each in judged)
    summary = (
        f"{num_good} of {len(judged)} clips are good by these limits. The scores of each clip are in filter.csv. "
        "Clips are moved only with move=."
    )
    return document(Head(f"{name}: filter", summary, _figures(judged)), _STYLE, "\n".join(content))


def _figures(judged: Sequence["Judged"]) -> dict[str, tuple[str, str]]:
    def count(flag: str) -> str:
        return str(sum(flag in each.flags for each in judged))

    return {
        "Good": (str(sum(not each.flags for each in judged)), f"of {len(judged)} clips"),
        "Black": (count("black"), "too many black pictures"),
        "Frozen": (count("frozen"), "the picture stands still for long"),
        "Blurred": (count("blurred"), "few fine details"),
        "Still": (count("still"), "nearly no motion"),
        "Border": (count("border"), "black bars at a side"),
        "Duplicates": (count("duplicate"), "show what a better clip shows"),
        "Unreadable": (count("unreadable"), "listed with the reason"),
    }


def _charts(judged: Sequence["Judged"], limits: Mapping[str, float | None]) -> str:
    scores = [each.scores for each in judged if each.scores is not None]
    nearest = [each.nearest for each in judged if each.scores is not None]
    axes = {
        Axis("Black", "share of black pictures", limits["max_black"]): [each.black for each in scores],
        Axis("Frozen", "longest run of equal pictures, as a share of the clip", limits["max_frozen"]): [
            each.frozen for each in scores
        ],
        Axis("Motion", "difference of pictures 0.1 s apart, of 255", limits["min_motion"], False, True, 0.01, 10): [
            each.motion for each in scores
        ],
        Axis("Sharpness", "variance of the Laplacian at 480 pixels", limits["min_sharpness"], False, True, 1, 1000): [
            each.sharpness for each in scores
        ],
        Axis("Border", "widest black bar, in pixels", limits["max_border"], ceiling=32): [
            float(each.border) for each in scores
        ],
        Axis(
            "Distance",
            "share of bits in which the hashes differ from the nearest clip's; of a group, one stays",
            limits["duplicate_distance"],
            False,
        ): nearest,
    }
    return "".join(histogram(axis, values) for axis, values in axes.items())


def _clip(each: "Judged", pictures: Mapping[str, bytes]) -> str:
    assert each.scores is not None
    shown = [name for name in (each.name, each.duplicate_of) if name in pictures]
    images = "".join(f'<img src="{data_uri("image/jpeg", pictures[name])}" alt="{escape(name)}">' for name in shown)
    scores = each.scores
    values = [
        f"black {scores.black:.0%}", f"frozen {scores.frozen:.0%}", f"motion {scores.motion:.3g}",
        f"sharpness {scores.sharpness:.1f}", f"border {scores.border} px", f"distance {each.nearest:.3g}",
    ]  # fmt: skip
    of = f" of {each.duplicate_of}" if each.duplicate_of else ""
    return (
        f'<figure><div class="pair">{images}</div><h3>{escape(each.name)}</h3>'
        f"<figcaption><b>{escape(', '.join(each.flags))}</b>{escape(of)}<br>{escape(', '.join(values))}</figcaption>"
        "</figure>"
    )

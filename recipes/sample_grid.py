"""Renders every prompt with every seed, checkpoint and strength: a grid, as one page and one video, or a farm.

The models are loaded once; between cells only the adapter's weights change. The latents of a cell are those that
`sample` computes with the same settings. Finished cells are kept, and the same command renders the rest. In a farm
several workers or runs share the cells, and each cell is rendered once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mochi_tune.config.load import RunConfig
from mochi_tune.data_prep.shares import Share
from mochi_tune.errors import ConfigError, counted
from mochi_tune.files import make_writable_folder
from mochi_tune.recipes.grid_page import GridCell, write_grid_page
from mochi_tune.recipes.sample import write_line
from mochi_tune.recipes.sample_cells import Cell, check_cells, is_done, is_farm, render_here
from mochi_tune.recipes.sample_claims import has_locks
from mochi_tune.recipes.sample_plan import lost_tails
from mochi_tune.sampling.grid_video import Row, is_legible, write_grid_video
from mochi_tune.sampling.requests import Request

# Maximum number of videos in the grid video, whose files are all open at once.
MOST_IN_A_VIDEO = 400


def main(config: RunConfig) -> Iterator[Path]:
    """Renders a grid or a farm; yields each cell's video when it is written, then the video and the page of a grid.

    Raises:
        KeyboardInterrupt: a signal stopped it; finished cells are kept, and the same command renders the rest.
    """
    cells, parallel = check_cells(config), config.parallel
    folder = cells[0].request.video.parent
    for needed in (Path(config.sample.prompt_cache).expanduser(), folder):
        make_writable_folder(needed)
    if is_farm(config) and not has_locks(folder):
        write_line(f"{folder}: its disk has no file locks: run no other `mochi-tune sample` on the same videos")
    for line in lost_tails(cells[0].plan):
        write_line(line)
    distinct = list({cell.request.video: cell for cell in cells}.values())
    mine, of_share = distinct, ""
    if parallel.shard is not None:
        share = Share.parse(parallel.shard)
        # Dealt in turn, so that the sizes of shares differ by at most one video.
        mine = distinct[share.number - 1 :: share.count]
        of_share = f", {len(mine)} in share {parallel.shard}"
    missing = [cell for cell in mine if not is_done(cell)]
    there = len(mine) - len(missing)
    write_line(f"{counted(len(cells), 'cell')} of {counted(len(distinct), 'video')}{of_share}, {there} done: {folder}")
    if missing and parallel.engine == "ray":
        from mochi_tune.recipes.sample_ray import render_on_ray

        yield from render_on_ray(config, missing)
    elif missing:
        yield from render_here(config, missing)
    if left := sum(not is_done(cell) for cell in missing):
        write_line(f"{left} videos are being rendered by another `mochi-tune sample`: run this again when it has ended")
    elif config.sample.grid and parallel.shard is None:
        yield from write_views(folder.parent, cells)
    elif config.sample.grid:
        write_line("when all shares are done, the same command without parallel.shard makes the page and the video")


def write_views(folder: Path, cells: Sequence[Cell]) -> Iterator[Path]:
    """Writes the video and the page of all cells; yields both paths."""
    shown = _labelled(cells)
    # Rows are grouped by prompt, whatever the order of rendering.
    order = {cell.request.prompt: number for number, cell in reversed(list(enumerate(cells)))}
    shown.sort(key=lambda cell: order[cell.prompt])
    columns = list(dict.fromkeys(cell.column for cell in shown))
    places = {column: place for place, column in enumerate(columns)}
    rows: dict[tuple[str, str], list[Path | None]] = {}
    for cell in shown:
        videos = rows.setdefault((cell.prompt, cell.row), [None] * len(columns))
        videos[places[cell.column]] = cell.video
    lines = [Row(f"{row}\n{prompt}".strip(), videos) for (prompt, row), videos in rows.items()]
    try:
        if len(cells) <= MOST_IN_A_VIDEO and is_legible(len(rows), len(columns)):
            yield write_grid_video(folder, lines, columns, cells[0].request.fps)
        else:
            write_line(f"no grid.mp4 of {len(cells)} videos, which would be too small to see; the page has them all")
    finally:
        # The page is written even if the grid video fails.
        page = write_grid_page(folder, shown, columns)
    yield page


def _labelled(cells: Sequence[Cell]) -> list[GridCell]:
    """Returns the cells with the labels of their rows and columns; columns are strengths, checkpoints or seeds."""
    values = {"strength": {c.strength for c in cells}, "checkpoint": {c.checkpoint for c in cells},
              "seed": {c.request.seed for c in cells}}  # fmt: skip
    across = next((axis for axis, found in values.items() if len(found) > 1), "seed")
    has_sizes = len({(c.request.num_frames, c.request.height, c.request.width) for c in cells}) > 1
    settings = [_settings_of(cell.request) for cell in cells]
    numbers = {each: number for number, each in enumerate(dict.fromkeys(settings), 1)}
    has_settings = len(numbers) > len({c.request.prompt for c in cells})
    shown = []
    for cell, own in zip(cells, settings, strict=True):
        request, axes = cell.request, {"seed": f"seed {cell.request.seed}"}
        if cell.checkpoint is not None:
            axes["checkpoint"] = f"step {cell.checkpoint}"
        if len(values["strength"]) > 1 or cell.strength != 1:
            axes["strength"] = f"strength {cell.strength:g}"
        row = [label for axis, label in axes.items() if axis != across]
        if has_sizes:
            row.append(f"{request.num_frames} frames of {request.height}x{request.width}")
        if has_settings:
            row.append(f"settings {numbers[own]}")
        shown.append(GridCell(request.prompt, ", ".join(row), axes.get(across, ""), request.video, request.num_frames))
    return shown


def _settings_of(request: Request) -> Request:
    return replace(request, seed=0, video=Path())


def renders_cells(config: RunConfig) -> bool:
    """Whether the settings ask for a grid or a farm.

    Raises:
        ConfigError: an axis of a grid is set without either.
    """
    for key in ("strengths", "checkpoints"):
        if getattr(config.sample, key) is not None and not (config.sample.grid or is_farm(config)):
            raise ConfigError(
                f"sample.{key} is an axis of a grid: add grid=true, or parallel.shard= or "
                "parallel.engine=ray for its videos alone."
            )
    return config.sample.grid or is_farm(config)

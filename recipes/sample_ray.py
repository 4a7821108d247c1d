"""Renders cells on the workers of a Ray cluster: encodes all prompts, samples all cells, then decodes them."""

import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mochi_tune.config.load import RunConfig
from mochi_tune.data_prep.ray_pool import RayPool
from mochi_tune.errors import ParallelError
from mochi_tune.models.device import find_device
from mochi_tune.recipes.sample_cells import Cell, CellRenderer, check_cells, has_latents, is_done
from mochi_tune.recipes.sample_claims import claimed
from mochi_tune.sampling.record import Usage

PARTS = ("text_encoder", "dit", "decoder")


@dataclass(frozen=True)
class RenderJob:
    """The job of every worker.

    Attributes:
        config: settings of the run, with the device of a worker.
        fingerprints: fingerprints of the weights by part, which every worker must have.
        num_threads: threads of torch; another number may change the last bits.
    """

    config: RunConfig
    fingerprints: Mapping[str, str]
    num_threads: int

    @property
    def device(self) -> str:
        """The device of each worker, "cpu" or "cuda"."""
        return self.config.device


@dataclass(frozen=True)
class RenderTask:
    """One stage of one cell.

    Attributes:
        stage: encode its prompts, sample or decode it.
        name: file name of the video.
    """

    stage: Literal["text", "sample", "decode"]
    name: str


def render_on_ray(config: RunConfig, cells: Sequence[Cell]) -> Iterator[Path]:
    """Renders cells; yields each video when it is written. Cells that another run has claimed are skipped.

    The DiT and the decoder take turns in each worker, as in `sample`: all cells are sampled, then all are decoded.

    Args:
        config: settings of the run.
        cells: unfinished cells with distinct videos.

    Raises:
        ConfigError: Ray is not installed.
        ParallelError: the cluster does not fit, a worker has other weights or adapters, or workers are lost repeatedly.
        MochiTuneError: an error of a worker.
    """
    parallel, weights = config.parallel, cells[0].plan.weights
    config = config.model_copy(update={"device": find_device(config.device).type})
    job = RenderJob(config, {part: weights.fingerprint(part) for part in PARTS}, torch.get_num_threads())
    by_name = {cell.request.video.name: cell for cell in cells}
    unsampled = [cell for cell in cells if not has_latents(cell)]
    # One cell for each pair of prompts: T5 reads no text twice.
    spoken = {(cell.request.prompt, cell.request.negative_prompt): cell for cell in unsampled}
    stages: dict[Literal["text", "sample", "decode"], Sequence[Cell]]
    stages = {"text": list(spoken.values()), "sample": unsampled, "decode": cells}
    with RayPool(job, parallel.num_processes, parallel.ray_address, RenderWorker) as pool:
        for stage, those in stages.items():
            tasks = [RenderTask(stage, cell.request.video.name) for cell in those]
            with tqdm(total=len(tasks), desc=stage, unit="video", leave=False, disable=not tasks) as bar:
                for task, made in pool.run(tasks, bar.update):
                    if stage == "decode" and made:
                        yield by_name[task.name].request.video


class RenderWorker:
    """The worker that runs in a Ray actor."""

    def __init__(self, job: RenderJob, folder: Path) -> None:
        # Paths in the settings are relative to this folder.
        os.chdir(folder)
        # As in the main process: hides warnings about kernels that torchao was built without.
        for noisy in ("torchao", "torch.utils._pytree"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        torch.set_num_threads(job.num_threads)
        self._job = job
        self._cells: dict[str, Cell] = {}
        self._renderer: CellRenderer | None = None

    def run(self, task: RenderTask, ahead: None) -> list[str] | Exception:
        """Runs a task; returns the video's name if this worker did it, or the error."""
        try:
            return [task.name] if self._do(task) else []
        except Exception as error:  # noqa: BLE001  (raised again in the main process)
            error.add_note(f"In a worker:\n{traceback.format_exc()}")
            return error

    def _do(self, task: RenderTask) -> bool:
        renderer = self._open()
        if (cell := self._cells.get(task.name)) is None:
            raise ParallelError(
                f"{task.name} is unknown to a worker, whose adapter, prompts or base differ from those of the main "
                "process: give each machine the same files under the same paths."
            )
        if task.stage == "text":
            renderer.encode([cell.request])
            return True
        with claimed(cell.request.video) as is_mine:
            if not is_mine or is_done(cell):
                return False
            if task.stage == "sample" and not has_latents(cell):
                renderer.sample(cell, renderer.encode([cell.request]), "")
            if task.stage == "decode":
                if not has_latents(cell):
                    return False
                # Only decoding is reported: another worker may have sampled the cell.
                with renderer.usage.stage("decode"):
                    renderer.decode(cell)
        return True

    def _open(self) -> CellRenderer:
        """Returns the renderer, which is created and checked at the first task."""
        if self._renderer is None:
            cells = check_cells(self._job.config)
            for part, expected in self._job.fingerprints.items():
                if (found := cells[0].plan.weights.fingerprint(part)) != expected:
                    raise ParallelError(
                        f"the weights of the {part} are {found[:16]}… in a worker and {expected[:16]}… in the main "
                        "process: give each process and machine the same files."
                    )
            self._cells = {cell.request.video.name: cell for cell in cells}
            usage = Usage(find_device(self._job.device), lambda _: None)
            self._renderer = CellRenderer(self._job.config, cells, usage)
        return self._renderer

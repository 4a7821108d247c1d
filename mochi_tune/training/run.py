"""The running training: everything except the model, the objective and the update, behind `with open_run(...)`."""

import contextlib
import faulthandler
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter
from mochi_tune.adapters.lora import settings_metadata, trained_layers
from mochi_tune.data_prep.changes import describe_changes
from mochi_tune.errors import ParallelError
from mochi_tune.files import make_writable_folder
from mochi_tune.models.device import peak_gib, reset_peak
from mochi_tune.parallel.kernels import attention_by, deterministic_kernels
from mochi_tune.training import checkpoint
from mochi_tune.training.accelerator import AdapterOptimizer, ZeroOptimizer, broadcast
from mochi_tune.training.checkpointer import Checkpointer, Retention, Snapshot, check_free_space, copy_to_cpu
from mochi_tune.training.choose_attention import choose_attention
from mochi_tune.training.draws import Draws
from mochi_tune.training.ema import EMA
from mochi_tune.training.guards import SpikeGuard, is_finite, refuse_step
from mochi_tune.training.interrupts import Interrupted, StopAndSaveSignals
from mochi_tune.training.loader import ClipLoader, Inputs, Prefetcher
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.preflight import TrainPlan, adapter_metadata
from mochi_tune.training.progress import Progress
from mochi_tune.training.report import ReportWriter
from mochi_tune.training.resume import ResumePoint, check_folder_is_shared, check_rows, lacks_evaluation, resume
from mochi_tune.training.run_folder import RunLock
from mochi_tune.training.schedule import is_due
from mochi_tune.training.step_result import MicroBatchResult, StepResult, merge_parts
from mochi_tune.training.summary import opening_lines
from mochi_tune.training.trackers import Trackers

# Seconds that one of several processes waits for its data after a signal to stop.
STOP_WAIT_SECONDS = 60.0


@contextlib.contextmanager
def open_run(plan: TrainPlan, accelerator: Accelerator) -> Iterator["Run"]:
    """Opens the run folder of a plan: locks it, finds where the run resumes, and opens metrics and trackers.

    A signal to stop ends the body of the `with` statement and saves the last finished step. Every process calls this.

    Raises:
        MochiTuneError: the folder belongs to another run or process, or the last step could not be saved.
    """
    assert accelerator.num_processes == plan.layout.num_ranks, "num_processes does not match the accelerator"
    plan.check_agreement()
    config, is_main = plan.config, accelerator.is_main_process
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        lock = None
        if is_main:
            make_writable_folder(run_dir / "samples")
            lock = stack.enter_context(RunLock(run_dir))
        if config.train.deterministic:
            stack.enter_context(deterministic_kernels())
        start = broadcast(resume(plan) if is_main else None)
        check_folder_is_shared(plan, start)
        attention = broadcast(choose_attention(plan, start) if is_main else None)
        metrics = trackers = None
        if is_main and (start.step < config.train.steps or start.lacks_evaluation):
            metrics = stack.enter_context(Metrics(run_dir, start.step, start.state.get("rows", {})))
            check_rows(metrics, start)
            # Trackers read the files of the metrics, so they are closed first. A run that goes back to a checkpoint or
            # resumes with forced changes is a new run in every tracker.
            last_step = 0 if start.is_named or start.changed else start.step
            trackers = Trackers(run_dir, last_step, config.name, plan.identity["settings"], config.log)
            stack.enter_context(trackers)
        run = Run(plan, accelerator, start, metrics, trackers)
        run.attention, run.lock = attention, lock
        lines = [] if run.is_complete else opening_lines(plan, start.step)
        if is_main:
            lines += describe_changes(config.data, config.seed, plan.dataset.cache)
        for line in lines if is_main else ():
            tqdm.write(line)
        with run:
            yield run
        run.finish()


class Run:
    """A running training; every process has one, and the main process writes the files.

    Attributes:
        step: the last finished step.
        exit_code: 0, 2 if the last evaluation could not be written, or 128 + the signal that stopped the run.
        attention: the attention kernel, one of `parallel.kernels.ALL_KERNELS`, or None if torch chooses it.
        lock: the lock of the run folder, on the main process.
    """

    attention: str | None = None
    lock: RunLock | None = None

    def __init__(
        self, plan: TrainPlan, accelerator: Accelerator, start: ResumePoint, metrics: Metrics | None,
        trackers: Trackers | None,
    ) -> None:  # fmt: skip
        self.plan, self.accelerator, self.start = plan, accelerator, start
        self.metrics, self.trackers = metrics, trackers
        self.run_dir = Path(plan.config.run_dir)
        self.report = ReportWriter(self.run_dir, plan.config) if accelerator.is_main_process else None
        self.step = self._saved_step = start.step
        self.exit_code, self._was_moved = 0, False
        data_rank = accelerator.process_index // plan.layout.context
        self._own_micro_batches = list(range(data_rank, plan.draws.num_micro_batches, plan.layout.data))
        train = plan.config.train
        self._guard = SpikeGuard(train.spike_policy, train.spike_factor, list(start.state.get("losses", ())))
        self._resources = contextlib.ExitStack()
        self._signals: StopAndSaveSignals | None = None
        self._checkpointer: Checkpointer | None = None
        self._verdict = ""

    @property
    def is_complete(self) -> bool:
        """Whether all steps are finished."""
        return self.step >= self.plan.config.train.steps

    @property
    def has_work(self) -> bool:
        """Whether a step remains, or the evaluation of the last step."""
        return not self.is_complete or self.start.lacks_evaluation

    @property
    def is_new(self) -> bool:
        """Whether the run starts without a checkpoint."""
        return self.start.folder is None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        with self._resources:
            faulthandler.cancel_dump_traceback_later()
            if not isinstance(error, Interrupted):
                return False
            signals = self._signals
            stop_signal = max(gather_object([0 if signals is None else signals.received]))
            self.save()
            is_over = self.is_complete and not broadcast(bool(self.metrics) and lacks_evaluation(self.plan, self.step))
            self.exit_code = 0 if is_over else 128 + stop_signal
            return True

    def restore_and_start(
        self,
        optimizer: AdapterOptimizer | ZeroOptimizer,
        ema: EMA | None,
        make_inputs: Callable[[Mapping[str, Any], Draws], Inputs],
    ) -> None:
        """Loads the checkpoint to resume from, if any, and starts to read clips and to handle signals.

        Args:
            optimizer: the optimizer of the adapter.
            ema: the moving average of the adapter, or None.
            make_inputs: returns the model inputs for collated clips and their random numbers. A background thread
                calls it up to two micro-batches ahead of the step.

        Raises:
            CheckpointError: the checkpoint belongs to another adapter or optimizer.
            OSError: the disk has no space for a checkpoint.
        """
        self.optimizer, self.ema = optimizer, ema
        plan, is_main = self.plan, self.accelerator.is_main_process
        train = plan.config.train
        if (folder := self.start.folder) is not None:
            adapter = checkpoint.load_adapter_tensors(folder / "adapter.safetensors")
            state = checkpoint.load_optimizer(folder / "optimizer.safetensors")
            optimizer.load(adapter, state, self.start.state["groups"])
            if ema is not None:
                # With resume=force a run may turn the average on, so the checkpoint may have none.
                averaged = folder / "averaged.safetensors"
                ema.load(checkpoint.load_adapter_tensors(averaged) if averaged.exists() else adapter)
        if self.metrics is not None:
            check_free_space(self.run_dir, plan.step.checkpoint_bytes)
            retention = Retention(train.keep_checkpoints, train.keep_every, train.keep_best)
            self._checkpointer = Checkpointer(self.run_dir, self.metrics, retention, tqdm.write)
        loader = ClipLoader(plan.dataset, plan.order, plan.draws, plan.config.data.damaged == "strict", tqdm.write)
        self._resources.callback(self._write_report)  # However the run ends.
        keys = ((step, number) for step in range(self.step + 1, train.steps + 1) for number in self._own_micro_batches)
        self._signals = self._resources.enter_context(StopAndSaveSignals())
        if self.attention is not None:
            self._resources.enter_context(attention_by(self.attention))

        def load(step: int, number: int) -> Inputs:
            return make_inputs(*loader.load(step, number))

        self._prefetcher = self._resources.enter_context(Prefetcher(load, keys, plan.device))
        self._progress = self._resources.enter_context(Progress(train.steps, self.step, is_main))

    def steps(self) -> Iterator[int]:
        """Yields the number of each remaining step."""
        while not self.is_complete:
            self._started = time.perf_counter()
            reset_peak(self.plan.device)
            yield self.step + 1

    def micro_batches(self) -> Iterator[Inputs]:
        """Yields the model inputs of each micro-batch that this process computes for the next step.

        Raises:
            DataError: a clip is damaged.
            Interrupted: the only process was asked to stop while it waited for data.
            ParallelError: one of several was, and waited too long.
        """
        return self._prefetcher.take(len(self._own_micro_batches), self._check_while_waiting)

    def gather_step(self, parts: Sequence[MicroBatchResult], grad_norm: Tensor, learning_rate: float) -> StepResult:
        """Combines the results of all processes for a step.

        This is the only call of a step that synchronizes with the device and with the other processes.

        Args:
            parts: the results of this process's micro-batches, in order.
            grad_norm: the norm of the averaged gradients, a tensor ().
            learning_rate: the learning rate of the update.
        """
        *losses, norm = torch.stack([*(part.loss for part in parts), grad_norm]).tolist()
        micro_batches = zip(self._own_micro_batches, losses, parts, strict=True)
        own = {number: (loss, part.clips, part.sigma.tolist()) for number, loss, part in micro_batches}
        stop_signal, save_requested, gathered = self._exchange(own)
        loss, clips, sigmas = merge_parts(gathered)
        return StepResult(self.step + 1, loss, norm, learning_rate, clips, sigmas, stop_signal, save_requested)

    def accepts(self, result: StepResult) -> bool:
        """Whether to update the adapter; with train.spike_policy=skip, a step whose loss is a spike has no update.

        Raises:
            TrainingError: the loss or the gradient norm is not finite, or the loss is a spike and
                train.spike_policy=stop.
        """
        is_sound = is_finite(result.loss, result.grad_norm)
        self._verdict = self._guard.verdict(result.loss) if is_sound else "not finite"
        if self._verdict in ("not finite", "stop"):
            self._refuse(result)
        return self._verdict != "skip"

    def finish_step(self, result: StepResult) -> None:
        """Records a finished step in metrics.jsonl and shows it on the progress bar."""
        self.step = result.step
        if self._verdict != "skip":
            self._guard.made(result.loss)
        seconds = round(time.perf_counter() - self._started, 4)
        spike = {"spike": self._verdict} if self._verdict else {}
        memory = {"memory_gib": peak_gib(self.plan.device)} if self.plan.device.type == "cuda" else {}
        if self.metrics is not None and self.trackers is not None:
            drawn = {"clips": result.clips, "sigmas": result.sigmas}
            self.metrics.log(result.numbers | {"seconds": seconds} | memory | spike | drawn)
            self.trackers.check()
        if spike:
            tqdm.write(f"step {self.step}: a loss of {result.loss:.4f}, far above the usual: {self._verdict}")
        self._progress.show(result, seconds)

    def save_if_due(self, result: StepResult) -> None:
        """Saves a checkpoint if the settings or a signal ask for one.

        Raises:
            Interrupted: a process was asked to stop.
        """
        train = self.plan.config.train
        is_due_here = any(is_due(self.step, every, train.steps) for every in (train.checkpoint_every, train.keep_every))
        if result.stop_signal or result.save_requested or is_due_here:
            self.save()
        if result.stop_signal and not self.is_complete:
            raise Interrupted

    def save(self, is_best: bool = False) -> None:
        """Writes a checkpoint of the last finished step unless it is already saved; every process calls this.

        Raises:
            TrainingError: the run folder was moved or removed. If it was moved, the step is saved in its new place.
        """
        if self._saved_step != self.step:
            weights, published = self.optimizer.weights(), self.published_weights()
            state, groups = self.optimizer.state()
            folder = None if self.lock is None else self.lock.find_folder()
            if self._checkpointer is not None and self.metrics is not None and folder is not None:
                rows = {"groups": groups, "losses": self._guard.losses, **self.metrics.state()}
                averaged = None if published is None else self._adapter(published)
                environment = self.plan.environment | {"attention": self.attention}
                facts = {"step": self.step, **self.plan.identity, "environment": environment, **rows}
                self._checkpointer.run_dir = folder
                self._checkpointer.save(Snapshot(self.step, self._adapter(weights), averaged, state, facts), is_best)
            self._saved_step = self.step
        if self.lock is not None:
            self.lock.check_in_place()
        elif self._was_moved:
            raise SystemExit(2)  # The main process reports it.

    def _write_report(self) -> None:
        # After the folder was moved, another run may have started at its path.
        if self.report is not None and self.lock is not None and self.lock.is_in_place():
            self.report.write()

    def published_weights(self) -> Mapping[str, Tensor] | None:
        """Returns the weights to validate, render and publish, or None if these are the trained weights."""
        return self.ema.tensors if self.ema is not None else self.optimizer.inference_weights()

    def check_signals(self) -> None:
        """Checks the signals of all processes between two pieces of work, and saves if one asks for it.

        Raises:
            Interrupted: a process was asked to stop.
        """
        stop_signal, save_requested, _ = self._exchange(None)
        if stop_signal:
            raise Interrupted
        if save_requested:
            self.save()

    def check_before_compiling(self) -> None:
        """Ends the step before a long compilation if a stop was requested and there is only one process.

        Several processes stop together after the step: they compile at different times, depending on their clips.

        Raises:
            Interrupted: the process was asked to stop.
        """
        if self.accelerator.num_processes == 1 and self.is_asked_to_stop():
            raise Interrupted

    def is_asked_to_stop(self) -> bool:
        """Whether this process received a signal to stop."""
        return self._signals is not None and self._signals.received > 0

    def finish(self) -> None:
        """Prints how the run ended.

        Raises:
            TrainingError: the last step could not be saved.
        """
        self.accelerator.wait_for_everyone()
        if self._checkpointer is not None and self.lock is not None:
            self.lock.check_in_place()
            self._checkpointer.check_saved(self.step)
            stopped = f"stopped after step {self.step} of {self.plan.config.train.steps}"
            tqdm.write(f"adapter: {self.run_dir / 'adapter.safetensors'}" if self.is_complete else stopped)
        if self.report is not None:
            if self.report.run is None:  # No step was left, but an older version may have written the page.
                self.report.write()
            for line in self.report.closing_lines() if self.is_complete else ():
                tqdm.write(line)

    def _exchange(self, own: object) -> tuple[int, bool, list]:
        """Returns the signal that stops the run, whether to save, and the value of `own` from each process."""
        assert self._signals is not None
        if self.accelerator.num_processes > 1:
            # Before the collective times out, each process writes its stack to stderr.
            faulthandler.dump_traceback_later(0.9 * self.plan.config.parallel.timeout_seconds)
        stop_signal, save_requested = self._signals.take()
        was_moved = self.lock is not None and not self.lock.is_in_place()
        stops, saves, moves, others = zip(*gather_object([(stop_signal, save_requested, was_moved, own)]), strict=True)
        self._was_moved = any(moves)  # Then a save ends the run.
        return max(stops), any(saves) or self._was_moved, list(others)

    def _check_while_waiting(self) -> None:
        """Handles signals while this process waits for data.

        Raises:
            Interrupted: the only process was asked to stop.
            ParallelError: one of several was, and its data has not arrived since.
        """
        assert self._signals is not None
        is_alone = self.accelerator.num_processes == 1
        # Between two steps the main process can save alone, unless the weights are sharded.
        can_save = self.accelerator.is_main_process and (is_alone or isinstance(self.optimizer, AdapterOptimizer))
        stop_signal, save_requested = self._signals.take() if can_save else (self._signals.received, False)
        if (stop_signal or save_requested) and can_save:
            self.save()
        if stop_signal and is_alone:
            raise Interrupted
        # The others may wait in a collective of this step. All save and stop together at its end.
        if self._signals.received_for(STOP_WAIT_SECONDS):
            raise ParallelError(
                f"asked to stop {STOP_WAIT_SECONDS:g} s ago, but the data of the next step has not arrived: check the "
                "disk of data.cache."
            )

    def _adapter(self, tensors: Mapping[str, Tensor]) -> Adapter:
        layers = self.plan.layers
        metadata = adapter_metadata(self.plan, self.step) | settings_metadata(layers)
        return Adapter(trained_layers(copy_to_cpu(tensors), layers), metadata)

    def _refuse(self, result: StepResult) -> NoReturn:
        """Ends the run before a harmful update and writes a bundle for `replay`; every process calls this."""
        weights = self.optimizer.weights()
        self.save()
        if not self.accelerator.is_main_process:
            raise SystemExit(2)  # The main process reports it.
        excess = self._guard.excess(result.loss) if self._verdict == "stop" else 0.0
        refuse_step(self.plan, result, self._verdict, excess, self.attention, weights)

"""Evaluation during training: the loss at fixed noise levels on held-out clips, and videos of base and LoRA."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from mochi_tune.adapters.lora import TRAINED, switch_adapters
from mochi_tune.config.sample import sample_size
from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.errors import CheckpointError, DataError
from mochi_tune.files import atomic_file, load_tensors, save_tensors, write_atomic
from mochi_tune.models.device import DTYPES, free_memory
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.text_encoder import prompt_dtype
from mochi_tune.models.vae import Decoder
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.sampling.formats import MP4, PNG
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.sampler import draw_noise, sample_latents
from mochi_tune.sampling.video import write_video
from mochi_tune.training.accelerator import broadcast
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.eval_files import is_written, prompt_file
from mochi_tune.training.interrupts import Interrupted
from mochi_tune.training.metrics import write_line
from mochi_tune.training.objective import noisy_and_target, velocity_loss
from mochi_tune.training.preflight import TrainPlan
from mochi_tune.training.progress import hides_bars
from mochi_tune.training.resume import lacks_evaluation
from mochi_tune.training.run import Run
from mochi_tune.training.schedule import is_due

# Noise levels of the validation: the centers of four equal bins of [0, 1].
SIGMAS = (0.125, 0.375, 0.625, 0.875)


def evaluate_if_due(run: Run, dit: nn.Module, videos: "EvalVideos | None") -> None:
    """Validates and renders the adapter if an evaluation of this step is due and not yet on disk.

    A full disk does not end the run, but the exit code is 2 if the evaluation of the last step is not on disk. Every
    process calls this.

    Raises:
        Interrupted: the run was asked to stop.
    """
    plan, train = run.plan, run.plan.config.train
    validates = train.validate_every > 0 and is_due(run.step, train.validate_every, train.steps)
    validates = validates and bool(plan.validation_clips)
    if validates:
        validates = broadcast(run.metrics is not None and not run.metrics.is_validated(run.step))
    renders = videos is not None and is_due(run.step, train.sample_every, train.steps)
    if not validates and not renders:
        return
    with run.optimizer.temporarily(run.published_weights()):
        if validates:
            is_strict = plan.config.data.damaged == "strict"
            clips = ValidationClips(plan.dataset, plan.validation_clips, plan.config.seed, train.objective, is_strict)
            losses, measured = validation_losses(dit, clips, plan.device, run.check_signals)
            if run.metrics is not None:
                row = {"step": run.step, "validation_loss": sum(losses.values()) / len(losses), "bins": losses}
                row |= {"held_out": bool(plan.held_out), "sigmas_drawn": run.metrics.sigma_histogram()}
                row |= {"measured_on": clips.digest(measured)}
                row |= {"measures_anew": True} if run.start.validates_on_others else {}
                run.metrics.log_validation(row)
                tqdm.write(validation_line(row, run.metrics.best_validation(), run.metrics.compares_with_none()))
        if renders and videos is not None:
            videos.render(dit, run.step)
    if validates and train.keep_best and run.step > 0:
        best = None if run.metrics is None else run.metrics.best_validation()
        if broadcast(best is not None and best[0] == run.step):
            run.save(is_best=True)  # Does nothing if the step is saved already.
    if run.report is not None:
        run.report.write()
    run.check_signals()
    if run.is_complete and run.metrics is not None and lacks_evaluation(plan, run.step):
        # Only the main process fails: if another one did, a launcher would stop this one, perhaps during a save.
        run.exit_code = 2
        write_line(f"the evaluation of step {run.step} could not be written: make room, and the same command makes it")


def validation_line(row: Mapping, best: tuple[int, float] | None, compares_with_none: bool = False) -> str:
    """Returns a line with the losses of a validation and the best so far, if earlier ones can be compared."""
    levels = ", ".join(f"{level}: {loss:.4f}" for level, loss in row["bins"].items())
    line = f"step {row['step']}: validation loss {row['validation_loss']:.4f} (by noise level {levels})"
    if compares_with_none:
        return f"{line}; earlier losses are of other clips, captions or noise, and are not compared with it"
    if best is None:
        return line
    return f"{line}, the best so far" if best[0] == row["step"] else f"{line}, best {best[1]:.4f} at step {best[0]}"


@dataclass(frozen=True)
class ValidationClips:
    """The clips and the noise that the validation loss is measured on.

    Attributes:
        dataset: all clips of the cache.
        indices: the clips to measure.
        seed: the seed of the noise.
        objective: a value of `train.objective`.
        is_strict: whether a damaged clip ends the validation; otherwise it is left out.
    """

    dataset: LatentDataset
    indices: Sequence[int]
    seed: int
    objective: str
    is_strict: bool = True

    def digest(self, measured: Sequence[int]) -> str:
        """Returns a hash of everything but the adapter that the losses of these clips depend on.

        It includes the indices of the clips, which key their noise.
        """
        rows = self.dataset.cache.rows
        clips = [(index, rows[index].clip_key, rows[index].text_keys) for index in measured]
        return hashlib.sha256(repr((self.seed, self.objective, clips)).encode()).hexdigest()[:12]


@torch.no_grad()
def validation_losses(
    dit: nn.Module, clips: ValidationClips, device: torch.device, on_clip: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], list[int]]:
    """Measures the loss on fixed clips and noise, because the random noise of training hides small improvements.

    Args:
        dit: the model; it is in training mode when this returns.
        clips: the clips to measure.
        device: the device of the model.
        on_clip: called before each clip; an exception that it raises ends the validation.

    Returns:
        The mean loss at each of SIGMAS, and the indices of the measured clips, without damaged ones.

    Raises:
        DataError: a clip is damaged and `clips.is_strict` is set, or all clips are damaged.
    """
    dit.eval()
    losses, measured = [], []
    is_quiet = hides_bars()
    try:
        for index in tqdm(clips.indices, "validation", unit="clip", leave=False, disable=is_quiet):
            on_clip()
            try:
                batch = collate([clips.dataset[index]])
            except DataError as error:
                if clips.is_strict or (not losses and index == clips.indices[-1]):
                    raise
                if PartialState().is_main_process:
                    tqdm.write(f"left out of the validation: {str(error).partition('; data.damaged')[0]}")
                continue
            measured.append(index)
            losses.append([])
            generator = keyed_generator(clips.seed, "validation", index)
            noise = torch.randn(batch["mean"].shape, generator=generator, dtype=torch.float32)
            for value in SIGMAS:
                sigma = torch.tensor([value])
                noisy, target = noisy_and_target(clips.objective, batch["mean"], noise, sigma)
                prediction = dit(
                    noisy.to(device), sigma.to(device), batch["prompt_embeds"].to(device), batch["prompt_mask"]
                )
                losses[-1].append(velocity_loss(prediction, target.to(device)).item())
    finally:
        dit.train()
    means = torch.tensor(losses).mean(0).tolist()
    return {f"{value:g}": loss for value, loss in zip(SIGMAS, means, strict=True)}, measured


def encode_eval_prompts(plan: TrainPlan) -> list[Tensor]:
    """Returns the T5 features (n, D) of the eval prompts and, last, of the negative prompt; [] without eval videos."""
    if not plan.renders_videos:
        return []
    dtype = prompt_dtype(plan.config.memory.t5_dtype, DTYPES[plan.config.model.dtype])
    encoder = plan.weights.load_text_encoder(plan.device, dtype)
    prompts = [*plan.config.train.sample_prompts, plan.config.sample.negative_prompt]
    features = [features.float().cpu() for features in encoder.encode(prompts)]
    del encoder
    free_memory()
    return features


class EvalVideos:
    """Renders a few prompts with the sampler of `mochi-tune sample`, from the same noise at every step.

    Every process samples; the main process decodes and writes the videos.
    """

    def __init__(self, run: Run, prompts: list[Tensor]) -> None:
        """Prepares to render.

        Args:
            run: the run whose adapter is rendered.
            prompts: the result of `encode_eval_prompts`.
        """
        self.run = run
        *self.prompts, self.negative_prompt = prompts
        config = run.plan.config
        self.folder = Path(config.run_dir) / "samples"
        size = sample_size(config.sample, config.data)
        self.noise = draw_noise(config.seed, *size)
        self.encoding = PNG if size[0] == 1 else MP4
        self.settings = sampler_settings(config.sample)

    def render(self, dit: nn.Module, step: int) -> None:
        """Renders the missing videos of a step; `dit` has the adapter of that step."""
        paths = [self.folder / f"step_{step:06d}_prompt_{i}.{self.encoding.format}" for i in range(len(self.prompts))]
        missing = broadcast([not is_written(path) for path in paths])
        # A new adapter changes nothing, unless a custom recipe has applied other adapters too.
        adapters = {name for module in dit.modules() for name in getattr(module, "lora_A", ())}
        is_base = step == 0 and self.run.plan.config.lora.init_from is None and adapters <= {TRAINED}
        pairs = {}
        for i in [i for i, is_missing in enumerate(missing) if is_missing]:
            base = self._base(dit, i)
            pairs[paths[i]] = base, base if is_base else self._sample(dit, self.prompts[i], paths[i].stem)
        if not pairs:
            return
        plan, decoder = self.run.plan, None
        if PartialState().is_main_process:
            decoder = plan.weights.load_decoder(plan.device, DTYPES[plan.config.model.dtype])
        for path, pair in pairs.items():
            # Only one process decodes. After each video, all processes check together whether to stop.
            with contextlib.suppress(Interrupted):
                if decoder is not None:
                    prompt = plan.config.train.sample_prompts[paths.index(path)]
                    self._write(path, prompt, self._side_by_side(decoder, *pair))
            self.run.check_signals()

    def _write(self, path: Path, prompt: str, frames: Iterator[Tensor]) -> None:
        """Writes a video and its prompt; if that fails, prints a line."""
        try:
            with atomic_file(path) as temporary:
                write_video(temporary, frames, fps=self.run.plan.config.sample.fps, encoding=self.encoding)
                # Write the prompt first: a video that exists is not rendered again and would never get its prompt.
                write_atomic(prompt_file(path), prompt.encode(), durable=True)
        except OSError as error:
            write_line(f"{path} could not be written ({error.strerror}): the run goes on without it")

    def _base(self, dit: nn.Module, i: int) -> Tensor:
        """Returns the latents of a prompt without the adapter, which are sampled once per run."""
        plan, inputs = self.run.plan, [self.noise, self.prompts[i], self.negative_prompt]
        # A later run in the same folder may have another base.
        base = repr((self.settings, plan.identity["base"], plan.config.model.dtype, plan.config.model.precision))
        digest = hashlib.sha256(base.encode() + b"".join(t.numpy().tobytes() for t in inputs))
        path = self.folder.parent / "base_latents" / f"base_prompt_{i}_{digest.hexdigest()[:12]}.safetensors"
        saved = None
        if PartialState().is_main_process and path.exists():
            # A damaged file is replaced.
            with contextlib.suppress(CheckpointError):
                saved = load_tensors(path)["latents"]
        if (saved := broadcast(saved)) is not None:
            return saved
        switch_adapters(dit, False)
        try:
            latents = self._sample(dit, self.prompts[i], f"base_prompt_{i}")
        finally:
            switch_adapters(dit, True)
        if PartialState().is_main_process:
            try:
                path.parent.mkdir(exist_ok=True)
                save_tensors(path, {"latents": latents}, durable=True)
            except OSError as error:
                write_line(f"{path} could not be written ({error.strerror}): the base is sampled again next time")
        return latents

    def _sample(self, dit: nn.Module, prompt: Tensor, name: str) -> Tensor:
        was_training = dit.training
        dit.eval()
        latents = self.noise
        is_quiet = hides_bars()
        try:
            steps = sample_latents(dit, self.noise, prompt, self.negative_prompt, self.settings)
            for state in tqdm(steps, name, self.settings.steps, unit="step", leave=False, disable=is_quiet):
                latents = state
                self.run.check_signals()
        finally:
            dit.train(was_training)
        return latents.cpu()

    def _side_by_side(self, decoder: Decoder, base: Tensor, adapted: Tensor) -> Iterator[Tensor]:
        def decode(latents: Tensor) -> Iterator[Tensor]:
            for chunk in decode_chunks(decoder, to_vae_latents(latents)):
                if self.run.is_asked_to_stop():
                    raise Interrupted
                yield chunk[0]

        # One after the other, because two decoders would both hold their frames on the device.
        for left, right in zip(list(decode(base)), decode(adapted), strict=True):
            yield torch.cat([left, right], dim=2)

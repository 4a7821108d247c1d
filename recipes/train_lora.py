"""Trains a LoRA on a prepared cache.

This file has the model, the loss and the update. `open_run` handles the run folder, resuming, data loading, signals and
checkpoints. The same command resumes a stopped run.

docs/change_the_recipe.md shows how to change this file: another loss, another logged number, a second adapter, frozen
layers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from mochi_tune.adapters.lora import apply_lora, load_start_adapter, lora_parameters
from mochi_tune.config.schema import RunConfig, TrainConfig
from mochi_tune.models.device import DTYPES
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.mesh import Mesh
from mochi_tune.parallel.modulation import HostModulation
from mochi_tune.training.accelerator import build_accelerator, prepare, then_partitioned
from mochi_tune.training.draws import Draws, key_seed
from mochi_tune.training.ema import EMA
from mochi_tune.training.evaluate import EvalVideos, encode_eval_prompts, evaluate_if_due
from mochi_tune.training.loader import Inputs
from mochi_tune.training.objective import (
    drop_captions,
    loss_weight,
    noisy_and_target,
    sample_posterior,
    sigmas_from_uniforms,
    velocity_loss,
)
from mochi_tune.training.optim import build_optimizer
from mochi_tune.training.preflight import TrainPlan, check
from mochi_tune.training.retry import MemoryRetry
from mochi_tune.training.run import Run, open_run
from mochi_tune.training.schedule import learning_rate_at
from mochi_tune.training.step_result import MicroBatchResult


def main(config: RunConfig, num_processes: int = 1) -> int:
    """Starts or resumes a training run; each of its `num_processes` processes calls it.

    Returns the exit code: 0, 128 + the signal that stopped the run, or 2 if its last evaluation could not be written.
    """
    # This checks the settings, the data and the files before any weight is read.
    plan = check(config, num_processes)
    train = config.train
    accelerator = build_accelerator(
        plan.device, config.parallel.strategy, train.accumulation_steps, train.max_grad_norm
    )
    with open_run(plan, accelerator) as run, plan.explains_out_of_memory():
        if run.has_work:
            train_adapter(plan, run)
    accelerator.end_training()  # This destroys the process group.
    return run.exit_code


def train_adapter(plan: TrainPlan, run: Run) -> None:
    """Builds the model with its adapter and trains the remaining steps."""
    config, accelerator, device = plan.config, run.accelerator, plan.device
    train, memory = config.train, plan.memory

    # Model. Only one large model is in memory at a time: T5 is freed before the DiT is loaded.
    eval_prompts = encode_eval_prompts(plan)
    load_device = "cpu" if memory.is_streamed else device
    each_block = then_partitioned(accelerator, plan.shrink_block, config.lora.dora)
    dit = plan.weights.load_dit(load_device, DTYPES[config.model.dtype], each_block)

    # Adapter. If the run resumes, `restore_and_start` below loads its weights.
    apply_lora(dit, plan.layers, key_seed(config.seed, "adapter"), config.lora.dora)
    if plan.start_adapter is not None and run.is_new:
        load_start_adapter(dit, plan.start_adapter.layers)
        if accelerator.is_main_process:
            tqdm.write(f"starts from {plan.start_adapter}, {plan.start_adapter.alpha_note}")
    parameters, host_modulation = lora_parameters(dit), HostModulation(dit)

    # Parallelism and memory.
    if plan.layout.context > 1:
        mesh = Mesh(plan.layout, device, config.parallel.timeout_seconds)
        apply_context_parallel(dit, mesh.context_group, mesh.layout.heads, config.parallel.check_inputs)
    memory.apply(dit, device, tqdm.write, run.check_before_compiling)
    with_retry = MemoryRetry(parameters.values(), memory.keep_less if plan.may_recompute_more else None, tqdm.write)

    # Optimizer.
    optimizer = build_optimizer(
        train.optimizer, parameters, train.learning_rate, train.weight_decay, train.learning_rate_b_ratio, device.type
    )
    dit, optimizer = prepare(accelerator, dit, parameters, optimizer, train.max_grad_norm)
    ema = EMA(optimizer.weights(), train.ema_decay) if train.ema_decay else None

    def add_gradients(inputs: Inputs) -> torch.Tensor:
        """Adds the gradients of a micro-batch to those of the adapter and returns its loss.

        `with_retry` calls this once more if the GPU runs out of memory.
        """
        torch.manual_seed(inputs.dropout_seed)
        velocity = dit(inputs.noisy, inputs.sigma, inputs.prompt, inputs.mask, inputs.modulation)
        losses = velocity_loss(velocity, inputs.target)
        loss = (losses * inputs.weight).mean()
        accelerator.backward(loss)
        return loss.detach()

    run.restore_and_start(optimizer, ema, functools.partial(make_inputs, train, host_modulation))
    videos = EvalVideos(run, eval_prompts) if eval_prompts else None
    dit.train()
    evaluate_if_due(run, dit, videos)
    for step in run.steps():
        learning_rate = learning_rate_at(
            step, train.learning_rate, train.warmup_steps, train.steps, train.schedule, train.decay_share
        )
        optimizer.set_learning_rate(learning_rate)
        results = []
        for inputs in run.micro_batches():
            with accelerator.accumulate(dit):
                loss = with_retry(add_gradients, inputs)
            results.append(MicroBatchResult(loss, inputs.clips, inputs.sigma))

        grad_norm = optimizer.clip_grad_norm()
        result = run.gather_step(results, grad_norm, learning_rate)
        if run.accepts(result):
            optimizer.step()
            if ema is not None:
                ema.update(optimizer.weights(), step)
        else:
            optimizer.skip_step()
        run.finish_step(result)
        # Save before the evaluation, which takes long and may fail.
        run.save_if_due(result)
        evaluate_if_due(run, dit, videos)


def make_inputs(train: TrainConfig, host_modulation: HostModulation, batch: Mapping[str, Any], drawn: Draws) -> Inputs:
    """Returns the model inputs and the target of a micro-batch.

    A background thread calls this up to two micro-batches ahead of the training step.

    Args:
        train: the training settings.
        host_modulation: computes the modulation of all blocks in host memory.
        batch: the collated clips: mean and logvar, (B, C, T, h, w), and prompt_embeds, (B, L, D).
        drawn: the random numbers of the micro-batch.
    """
    sigma = sigmas_from_uniforms(
        drawn.uniforms, train.sigma_distribution, train.sigma_mean, train.sigma_std, train.sigma_shift
    )[drawn.rows]
    vae_latents = sample_posterior(batch["mean"], batch["logvar"], drawn.posterior_noise)
    noisy, target = noisy_and_target(train.objective, vae_latents, drawn.noise, sigma)
    prompt, mask = drop_captions(batch["prompt_embeds"], batch["prompt_mask"], drawn.drops_caption)
    weight = loss_weight(sigma, train.loss_weighting)
    # The modulation of all blocks depends only on sigma and the prompt, so it can be computed ahead of the step.
    modulation = host_modulation(sigma, prompt, mask)
    return Inputs(
        clips=batch["sample_ids"], sigma=sigma, mask=mask, dropout_seed=drawn.dropout_seed, noisy=noisy, target=target,
        prompt=prompt, weight=weight, modulation=modulation,
    )  # fmt: skip

"""Precomputed modulation equals the output of the layers; a row that was not computed is an error."""

import pytest
import torch
from helpers_golden import GOLDEN, golden_dit, relative_error, vectors

from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.modulation import ModulationTable, apply_host_modulation
from mochi_tune.sampling.sampler import (
    Denoiser,
    SamplerSettings,
    euler_steps,
    guide_in_one_batch,
    guide_in_turn,
    linear_quadratic_sigmas,
    sample_latents,
)
from mochi_tune.weights.folder import WeightsFolder

IO = vectors("dit_io")
PROMPT, NEGATIVE = (IO["y_feat"], IO["y_mask"]), (IO["null_feat"], torch.zeros_like(IO["y_mask"]))
PROMPTS = {"cond": PROMPT, "uncond": NEGATIVE}
GUIDANCE = IO["cfg_schedule"].tolist()
SIGMAS = linear_quadratic_sigmas(len(GUIDANCE), 0.025)
VALID = IO["y_feat"][0, IO["y_mask"][0].bool()]


def tabulated_dit() -> AsymmDiT:
    return WeightsFolder(GOLDEN).load_dit("cpu", torch.float32, lambda _, block: apply_host_modulation(block))


def rendered(dit, prompt, guide=guide_in_turn) -> torch.Tensor:
    settings = SamplerSettings(len(GUIDANCE), tuple(GUIDANCE), 0.025)
    *_, latents = sample_latents(dit, IO["z"], prompt, VALID[:0], settings, guide)
    return latents


@pytest.mark.parametrize("guide", [guide_in_turn, guide_in_one_batch])
def test_tables_render_the_official_latents(guide):
    dit = tabulated_dit()
    assert not [name for name, _ in dit.named_parameters() if ".mod_" in name and name.startswith("blocks")]
    denoiser = Denoiser(dit, PROMPT, NEGATIVE, ModulationTable(dit, SIGMAS[:-1], PROMPTS))
    *_, latents = euler_steps(denoiser, IO["z"], SIGMAS, GUIDANCE, guide)
    assert relative_error(latents, IO["sample_dit"]) <= 2e-5


@torch.no_grad()
def test_each_row_is_what_the_layers_compute():
    dit, plain = tabulated_dit(), golden_dit()
    table = ModulationTable(dit, SIGMAS[:-1], PROMPTS)
    for sigma in SIGMAS[:-1]:
        for names in (["cond"], ["uncond"], ["cond", "uncond"], ["uncond", "cond"]):
            c = torch.cat([plain.condition(torch.tensor([sigma]), *PROMPTS[name]) for name in names])
            selected = table.select(sigma, names)
            assert relative_error(selected.c, c) <= 1e-5
            for (mod_x, mod_y), block in zip(selected.blocks, plain.blocks, strict=True):
                assert relative_error(mod_x, block.mod_x(c)) <= 1e-5
                assert relative_error(mod_y, block.mod_y(c)) <= 1e-5


@torch.no_grad()
def test_a_row_that_was_not_computed_is_an_error():
    dit = tabulated_dit()
    denoiser = Denoiser(dit, PROMPT, NEGATIVE, ModulationTable(dit, SIGMAS[:-1], {"cond": PROMPT}))
    denoiser(IO["z"], SIGMAS[0], ["cond"])
    with pytest.raises(AssertionError, match=r"no row for \[\('uncond', 1\.0\)\]"):
        denoiser(IO["z"], SIGMAS[0], ["uncond"])
    with pytest.raises(AssertionError, match=r"no row for \[\('cond', 0\.123\)\]"):
        denoiser(IO["z"], 0.123, ["cond"])
    assert ModulationTable(golden_dit(), SIGMAS[:-1], PROMPTS).select(0.123, ["cond"]) is None, "the model computes it"


def test_alternating_renderings_have_separate_tables():
    dit, settings = tabulated_dit(), SamplerSettings(len(GUIDANCE), tuple(GUIDANCE), 0.025)
    prompts = VALID, VALID[:3]
    steps = [sample_latents(dit, IO["z"], prompt, VALID[:0], settings) for prompt in prompts]
    *_, last = zip(*steps, strict=True)
    for got, prompt in zip(last, prompts, strict=True):
        assert torch.equal(got, rendered(dit, prompt))


def test_compiled_blocks_read_the_rows_of_every_step_and_prompt():
    plain, compiled = tabulated_dit(), tabulated_dit()
    for block in compiled.blocks:
        # This tests what torch captures and guards; the backend does not matter.
        block.forward = torch.compile(block.forward, dynamic=True, backend="eager")
    for prompt in (VALID, VALID[:3]):
        for guide in (guide_in_turn, guide_in_one_batch):
            assert relative_error(rendered(compiled, prompt, guide), rendered(plain, prompt, guide)) <= 1e-5

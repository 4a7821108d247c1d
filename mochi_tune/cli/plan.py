"""The verb `plan`: prints the estimated memory, time and disk of a run as tables."""

from mochi_tune.cli.options import load
from mochi_tune.cli.values import whole_number

CARD = ("card", "card_gib")


def run_plan(arguments: list[str]) -> int:
    """Estimates memory, time and disk of a run."""
    own = {key: value for key, _, value in (a.partition("=") for a in arguments if "=" in a) if key in CARD}
    if (config := load("plan", [a for a in arguments if "=" not in a or a.partition("=")[0] not in own])) is None:
        return 0
    from mochi_tune.errors import format_bytes
    from mochi_tune.parallel.forecast import in_words, short_seconds
    from mochi_tune.recipes.plan import SMALL_MODELS
    from mochi_tune.recipes.plan import main as plan
    from mochi_tune.recipes.plan_measure import can_measure, measure

    card_gib = whole_number("card_gib", own["card_gib"], 1) if "card_gib" in own else 0
    made = plan(config, own.get("card", ""), card_gib)
    gib = 2**30
    print(f"clips       {made.clips}: {made.num_tokens:,} tokens")
    print(f"GPU         {made.card}, {made.gib:.1f} GiB")
    if made.processes:
        print(f"processes   {made.processes}")
    disk = f"checkpoints {format_bytes(made.checkpoint_bytes)}"
    print(f"disk        {f'cache up to {format_bytes(made.cache_bytes)}, ' if made.cache_bytes else ''}{disk}")
    parts = max((list(stage.held) for stage in made.stages), key=len)
    print(f"\n{'GiB':<18}{''.join(f'{part:>15}' for part in parts)}{'total':>8}  {'':<6} time")
    for stage in made.stages:
        held = "".join(f"{stage.held.get(part, 0) / gib:>15.1f}" for part in parts)
        verdict = "fits" if stage.total <= made.gib * gib else "NOT"
        time = "" if stage.seconds is None else f"{short_seconds(stage.seconds)} {stage.per}"
        print(f"{stage.name:<18}{held}{stage.total / gib:>8.1f}  {verdict:<6} {time}".rstrip())
    measured = "" if config.model.name in SMALL_MODELS else "; on an H200 they were within 10 % of what was measured"
    print(f"The total has 1 GiB to spare. These are estimates{measured}.")
    if made.run_seconds is not None:
        print(f"\ntraining: {config.train.steps} steps in about {in_words(made.run_seconds)}")
    print(f"\n{'memory=':<10}{'train':>16}{'sample':>16}")
    for name, sizes in made.presets.items():
        # In `train`, memory=24gb keeps the weights on the GPU like 80gb.
        missing = "as 80gb" if name == "24gb" else "not possible"
        cells = (
            missing if size is None else f"{size / gib:.1f} {'fits' if size <= made.gib * gib else 'NOT '}"
            for size in sizes
        )
        print(f"{name:<10}{''.join(f'{cell:>16}' for cell in cells)}".rstrip())
    print("\n" + "\n".join(made.advice))
    if not own and can_measure(config):
        found = measure(config)
        print(
            f"\nmeasured here: a training step takes {found.seconds:.2f} s (the first one {found.first_seconds:.0f} s) "
            f"and {found.peak_gib:.1f} GiB; the estimates are the figures of `train` above, less 1 GiB"
        )
    return 0

"""The experiments on the toy model, and the arms (ways of training) that each one compares."""

from dataclasses import dataclass

from mochi_tune.adapters.lora import linear_shapes, select_layers
from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.models.latents import FPS
from mochi_tune.toy.lesson import NUM_CLIPS
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Arm:
    """One way of training. The defaults are those of the demo.

    Attributes:
        settings: `key=value` overrides of conf/toy_lora.yaml.
        num_clips: number of clips, the first ones of the lesson; they have all shapes.
        fps: frames per second at which the clips are drawn.
        rounds_to_bf16: whether the adapter and its optimizer's moments are rounded to bf16 after every step, as if they
            were stored in bf16. This is not a setting: `train` stores them in fp32.
    """

    settings: tuple[str, ...] = ()
    num_clips: int = NUM_CLIPS
    fps: int = FPS
    rounds_to_bf16: bool = False


DEFAULT = Arm()
SLOW = Arm(("train.learning_rate=2e-4",))


def arms() -> dict[str, dict[str, Arm]]:
    """Returns the experiments: name of the experiment -> name of the arm -> arm."""
    return {
        "objective": {
            "sampler": DEFAULT,
            "official": Arm(("train.objective=official",)),
            "unnormalised": Arm(("train.objective=unnormalised",)),
        },
        "layers": _layers(),
        "precision": {
            name: Arm(("model.dtype=bf16", f"model.precision={name}")) for name in ("bf16", "fp8", "int8", "nf4")
        },
        "frame_rate": {"retime": Arm(("data.frame_rate=retime",), fps=24), "resample": Arm(fps=24)},
        "rate": {
            "2e-4": SLOW,
            "5e-4": Arm(("train.learning_rate=5e-4",)),
            "1e-3": DEFAULT,
            "2e-3": Arm(("train.learning_rate=2e-3",)),
            "5e-3": Arm(("train.learning_rate=5e-3",)),
        },
        # Alpha is always twice the rank.
        "rank": {
            "1": Arm(("lora.rank=1", "lora.alpha=2")),
            "4": Arm(("lora.rank=4", "lora.alpha=8")),
            "16": DEFAULT,
            "64": Arm(("lora.rank=64", "lora.alpha=128")),
        },
        # The number of steps is the same: fewer clips are seen more often.
        "clips": {"4": Arm(num_clips=4), "8": Arm(num_clips=8), "16": Arm(num_clips=16), "24": DEFAULT},
        # Separate runs, not checkpoints of one, because the schedule of each falls until its last step.
        "steps": {
            "100": Arm(("train.steps=100",)),
            "200": Arm(("train.steps=200",)),
            "400": Arm(("train.steps=400",)),
            "600": DEFAULT,
            "1200": Arm(("train.steps=1200",)),
        },
        "caption_dropout": {
            "0": Arm(("train.caption_dropout=0",)),
            "0.1": DEFAULT,
            "0.3": Arm(("train.caption_dropout=0.3",)),
        },
        "sigma": {
            "uniform": DEFAULT,
            "logit_normal": Arm(("train.sigma_distribution=logit_normal",)),
            "shifted by 3": Arm(("train.sigma_distribution=shifted", "train.sigma_shift=3")),
        },
        "adapter_dtype": {
            "fp32, rate 1e-3": DEFAULT,
            "bf16, rate 1e-3": Arm(rounds_to_bf16=True),
            "fp32, rate 2e-4": SLOW,
            "bf16, rate 2e-4": Arm(SLOW.settings, rounds_to_bf16=True),
        },
    }


def run_names() -> dict[Arm, str]:
    """Returns a relative path for each arm. Equal arms of several experiments share one."""
    names = {DEFAULT: "default"}
    for what, those in arms().items():
        for name, arm in those.items():
            names.setdefault(arm, f"{what}/{name.replace(', ', '_').replace(' ', '_')}")
    return names


def _layers() -> dict[str, Arm]:
    """Returns attention only, and attention with MLPs, at nearly the same number of parameters."""
    shapes = linear_shapes(WeightsFolder(weights_paths(load_config("toy_lora", []))).dit_skeleton())
    wide, narrow = (load_config("toy_lora", [f"lora={name}"]).lora for name in ("attention_mlp", "attention"))
    size, small = (sum(sum(shapes[n]) for n in select_layers(shapes, lora.targets)) for lora in (wide, narrow))
    # Fewer layers need a higher rank for the same number of parameters.
    rank = round(wide.rank * size / small)
    return {
        f"attention rank {rank}": Arm(("lora=attention", f"lora.rank={rank}", f"lora.alpha={2 * rank}")),
        f"attention and MLP rank {wide.rank}": DEFAULT,
    }

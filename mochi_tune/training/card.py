"""Writes the model card of a published adapter: README.md with the hub's front matter.

Source: huggingface/hub-docs modelcard.md (the front matter), docs/hub/model-cards-components.md (the gallery).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mochi_tune.config.sample import sample_size
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.errors import counted
from mochi_tune.models.latents import FPS
from mochi_tune.sampling.requests import rate_of, sampler_settings
from mochi_tune.training.records import RunRecords, SampleVideo

# The file name that diffusers loads by default.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CURVE_FILE = "validation_loss.png"
_PACKAGED_BASES = ("tiny", "toy")


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        title: title of the adapter.
        repo: owner/name on the hub.
        base: the base model on the hub, such as genmo/mochi-1-preview; None if the adapter has another base.
        base_name: name of the base in the metadata of the adapter.
        about: "author", "license" and "trigger_phrase", as far as they are known.
        adapter: "rank", "alpha", "layers" and "dtype" for the table.
        is_dora: whether the adapter is a DoRA.
        files: file name of each format in the folder.
        records: the records of the run, or None.
        videos: file name and description of each video in the folder.
    """

    title: str
    repo: str
    base: str | None
    base_name: str
    about: Mapping[str, str]
    adapter: Mapping[str, str]
    is_dora: bool
    files: Mapping[str, str]
    records: RunRecords | None
    videos: Sequence[tuple[str, SampleVideo]]


def card_text(card: Card) -> str:
    """Returns the text of README.md."""
    sections = [
        f"---\n{_front_matter(card)}---",
        f"# {_cell(card.title)}",
        _introduction(card),
        _samples(card.videos),
        f"## Use it in diffusers\n\n{_diffusers(card)}",
        f"## Use it in ComfyUI\n\n{_comfyui(card)}",
        f"## Use it in mochi-tune\n\n{_mochi_tune(card)}",
        _training(card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(card: Card) -> str:
    import yaml

    facts = {
        "base_model": card.base,
        "base_model_relation": "adapter" if card.base else None,
        "pipeline_tag": "text-to-video",
        "library_name": "diffusers" if "diffusers" in card.files else None,
        "license": card.about.get("license"),
        "instance_prompt": card.about.get("trigger_phrase"),
        "tags": ["text-to-video", "mochi", "lora", "template:diffusion-lora", "mochi-tune"],
        "widget": [{"text": video.prompt, "output": {"url": name}} for name, video in card.videos],
    }
    return yaml.safe_dump({key: value for key, value in facts.items() if value}, sort_keys=False, allow_unicode=True)


def _introduction(card: Card) -> str:
    kind = "DoRA" if card.is_dora else "LoRA"
    base = f"[{card.base}](https://huggingface.co/{card.base})" if card.base else f"the model `{card.base_name}`"
    lines = [f"A {kind} for {base}, trained with mochi-tune."]
    if author := card.about.get("author"):
        lines.append(f"By {_cell(author)}.")
    if trigger := card.about.get("trigger_phrase"):
        lines.append(f"Put **{_cell(trigger)}** into the prompt.")
    if card.is_dora:
        lines.append("A DoRA renders what was trained only at strength 1.")
    return " ".join(lines)


def _samples(videos: Sequence[tuple[str, SampleVideo]]) -> str:
    if not videos:
        return ""
    lines = ["## Samples\n\n<Gallery />\n"]
    if any(video.is_compared for _, video in videos):
        lines.append(
            "Where a video has two halves, the left one is the base and the right one has the adapter, from the"
        )
        lines.append("same prompt and noise.\n")
    lines += ["| video | prompt |", "| --- | --- |"]
    lines += [f"| [{name}]({name}) | {_cell(video.prompt)} |" for name, video in videos]
    return "\n".join(lines)


def _prompt(card: Card) -> str:
    if card.videos:
        return card.videos[0][1].prompt
    return " ".join(filter(None, [card.about.get("trigger_phrase"), "a teacup shatters"]))


def _size(card: Card) -> tuple[int, int, int]:
    """Returns frames, height and width for the examples: those that the run renders."""
    return sample_size(card.records.config.sample, card.records.config.data) if card.records else (37, 480, 848)


def _diffusers(card: Card) -> str:
    if "diffusers" not in card.files:
        return _conversion(card, "diffusers", DIFFUSERS_FILE)
    num_frames, height, width = _size(card)
    steps, guidance, negative, rate = 64, 6.0, "", FPS
    if card.records:
        sample = card.records.config.sample
        settings = sampler_settings(sample)
        steps, guidance, negative = settings.steps, max(settings.scales), sample.negative_prompt
        rate = rate_of(sample)
    return f"""\
```python
# pip install diffusers transformers accelerate peft sentencepiece imageio imageio-ffmpeg
import torch
from diffusers import MochiPipeline
from diffusers.utils import export_to_video

# The option makes an empty negative prompt what it is in the original code and in mochi-tune.
pipe = MochiPipeline.from_pretrained(
    {(card.base or "FOLDER_OF_THE_BASE")!r}, torch_dtype=torch.bfloat16, force_zeros_for_empty_prompt=True
)
pipe.load_lora_weights({card.repo!r}, weight_name={card.files["diffusers"]!r})
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
frames = pipe(
    {_prompt(card)!r},
    negative_prompt={negative!r},
    num_frames={num_frames},
    height={height},
    width={width},
    num_inference_steps={steps},
    guidance_scale={guidance},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "video.mp4", fps={rate})
```"""


def _comfyui(card: Card) -> str:
    # ComfyUI also reads the other formats.
    name = next((card.files[to] for to in ("comfyui", "kohya", "official") if to in card.files), None)
    if card.is_dora:
        return "ComfyUI has no DoRA format that renders what was trained."
    if name is None:
        name = f"{card.repo.partition('/')[2]}.safetensors"
        text = f"{_conversion(card, 'comfyui', name)}\n\nMove it to `ComfyUI/models/loras`."
    else:
        text = f"```\nhf download {card.repo} {name} --local-dir ComfyUI/models/loras\n```"
    inputs = json.dumps({"model": ["1", 0], "lora_name": name, "strength_model": 1.0})
    return f"""\
{text}

Put a node *LoraLoaderModelOnly* between the node that loads the Mochi model and the sampler. In a workflow in the API
format, where node 1 loads the model:

```json
{{"2": {{"class_type": "LoraLoaderModelOnly",
       "inputs": {inputs}}}}}
```"""


def _mochi_tune(card: Card) -> str:
    name = next(iter(card.files.values()))
    num_frames, height, width = _size(card)
    model = f"model={card.base_name} " if card.base_name in _PACKAGED_BASES else ""
    return f"""\
```
hf download {card.repo} {name} --local-dir .
mochi-tune sample conf=my_lora {model}adapter={name} {shlex.quote(f"prompt={_prompt(card)}")} \\
  num_frames={num_frames} height={height} width={width}
```"""


def _conversion(card: Card, to: str, name: str) -> str:
    source = next(iter(card.files.values()))
    return f"""\
Convert the file in this repository:

```
hf download {card.repo} {source} --local-dir .
mochi-tune export adapter={source} to={to} out={name}
```"""


def _training(card: Card) -> str:
    facts = dict(card.adapter)
    if card.records:
        facts = _data_facts(card.records) | facts | _run_facts(card.records)
    lines = [
        "## Training\n",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in facts.items()),
    ]
    if card.records and card.records.losses:
        where = "clips that it does not train on" if card.records.is_held_out else "clips that it also trains on"
        lines += [
            f"\n![validation loss over the steps]({CURVE_FILE})\n",
            f"The validation loss is the mean over four noise levels, on {where}.",
        ]
    return "\n".join(lines)


def _data_facts(records: RunRecords) -> dict[str, str]:
    sizes = sorted({bucket for each in buckets_by_source(records.config.data).values() for bucket in each})
    shown = ", ".join(map(str, sizes[-3:])) + (f" and {len(sizes) - 3} smaller sizes" if len(sizes) > 3 else "")
    return {"clips trained on": f"{records.num_trained} of {records.num_clips}", "size of the clips": shown}


def _run_facts(records: RunRecords) -> dict[str, str]:
    train = records.config.train
    clipping = f"gradient norm {train.max_grad_norm:g}" if train.max_grad_norm else "gradients unclipped"
    facts = {
        "steps": str(records.step),
        "clips a step": str(records.global_batch),
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}, {clipping}",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, {counted(train.warmup_steps, 'step')} of warm-up",
        "objective": f"{train.objective}, noise levels {train.sigma_distribution}",
        "captions left out": f"{train.caption_dropout:g} of the samples",
        "moving average": f"{train.ema_decay:g}" if train.ema_decay else "none",
        "base in": records.config.model.precision or records.config.model.dtype,
        "seed": str(records.config.seed),
        "time": f"{records.seconds / 3600:.1f} hours"
        if records.seconds >= 3600
        else f"{records.seconds / 60:.1f} minutes",
        "last validation loss": f"{records.losses[-1][1]:.4f}" if records.losses else "",
        "device": str(records.environment.get("device", "")),
        "torch": str(records.environment.get("torch", "")),
        "started": records.date,
    }
    return {key: value for key, value in facts.items() if value}


def _cell(text: str) -> str:
    """Escapes a text for a cell of a Markdown table."""
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|#!" else char for char in text)
    return " ".join(escaped.split())

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_prepare import TINY
from helpers_video import write_video

from mochi_tune.cli.main import run as run_here
from mochi_tune.data_prep.chat import Turn
from mochi_tune.data_prep.inspection import as_jpeg
from mochi_tune.data_prep.local_captioner import LocalCaptioner
from mochi_tune.errors import CheckpointError, ConfigError

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }} : {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def seer(tmp_path_factory) -> Path:
    """A vision-language model with random weights, saved by its own classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("seer")
    marks = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = {word: number for number, word in enumerate([*marks, *"abcdefghijklmnopqrstuvwxyz"])}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), marks, strict=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, **names, additional_special_tokens=["<image>"]
    )  # fmt: skip
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16).to_dict(),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(words), num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ).to_dict(),
        image_token_id=words["<image>"],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def picture(shade: int) -> bytes:
    return as_jpeg(torch.full((20, 30, 3), shade, dtype=torch.uint8), 30)


def test_a_model_answers_a_conversation_with_pictures(seer):
    captioner = LocalCaptioner(seer, "cpu", 7)
    assert captioner.check() == []
    first = Turn("user", "a b", (picture(0), picture(255)))
    answer = captioner.ask([first], 60)
    # user : <image> x 4 for each of the two pictures, a b </s> assistant : - nine words and eight marks.
    assert answer.prompt_tokens == 2 + 8 + 2 + 1 + 2 and answer.completion_tokens == 7
    assert answer.is_cut_off and answer.text
    longer = captioner.ask([first, Turn("assistant", "c"), Turn("user", "d")], 60)
    assert longer.prompt_tokens == answer.prompt_tokens + 4 + 4
    assert captioner.ask([first], 60) == answer
    # It uses the pictures: not all of many give the same answer.
    others = [captioner.ask([Turn("user", "a b", (picture(shade), picture(0)))], 60) for shade in range(0, 256, 15)]
    assert len({other.text for other in others}) > 1
    captioner.close()


def test_the_command_line_takes_a_local_model(seer, tmp_path):
    write_video(tmp_path / "a.mp4", 7)
    settings = ["retries=1", "max_tokens=5", "num_frames=2", "device=cpu", f"model.weights={TINY}", "language=any"]
    assert run_here(["describe", f"videos={tmp_path}", "endpoint=local", f"model={seer}", *settings]) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "describe.jsonl").read_text().splitlines()]
    # A model with random weights does not write captions.
    assert row["requests"] == 2 and row["completion_tokens"] == 10 and "ends before a caption" in row["error"]


def test_what_is_no_such_model_is_one_line(seer, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        LocalCaptioner(tmp_path, "cpu", 7).check()
    for name, spoil, error, text in [
        ("text", _make_text_model, CheckpointError, "cannot be loaded as a model that describes pictures"),
        ("pickle", _make_pickle, CheckpointError, "cannot be loaded"),
        ("code", _make_code, CheckpointError, "cannot be loaded"),
        ("silent", lambda folder: (folder / "chat_template.jinja").unlink(), ConfigError, "has no chat template"),
    ]:
        folder = tmp_path / name
        shutil.copytree(seer, folder)
        spoil(folder)
        with pytest.raises(error, match=text):
            LocalCaptioner(folder, "cpu", 7).check()
    assert not (tmp_path / "was_run").exists()


def _make_text_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _make_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForImageTextToText": "own.Own", "AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder.parent / 'was_run')!r}, 'w')\nclass Own: pass\n")

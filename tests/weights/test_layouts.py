"""Weights in the layouts of other tools: they give the same models as the official files, or are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_diffusers import to_diffusers
from helpers_eight_bit import dequantized
from helpers_golden import GOLDEN
from helpers_process import run
from helpers_weights import TINY, make_comfyui, official, prefixed, small_configs
from safetensors.torch import load_file, save_file

from mochi_tune.errors import CheckpointError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.memory import apply_quantization
from mochi_tune.parallel.precision import apply_precision
from mochi_tune.weights.fill import build_meta_model
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import diffusers_map
from mochi_tune.weights.paths import WeightsPaths

FP8 = torch.float8_e4m3fn


def t5() -> dict[str, torch.Tensor]:
    return load_file(TINY / "text_encoder" / "model.safetensors")


def scaled_fp8(tensors: dict, names=lambda name: name.endswith(".weight") and "norm" not in name, note="scaled"):
    """Rounds matrices to fp8 with a scale each, or per row ("rows"), in ComfyUI's keys; returns the numbers, too."""
    stored, exact = {}, dict(tensors)
    for name, tensor in tensors.items():
        if not names(name) or tensor.ndim != 2 or "shared" in name or "relative" in name:
            stored[name] = tensor
            continue
        scale = tensor.float().abs().amax(1 if note == "rows" else (0, 1), keepdim=note == "rows") / 448
        stored[name] = (tensor.float() / scale).to(FP8)
        exact[name] = stored[name].float() * scale
        layer = name.removesuffix(".weight")
        if note == "scaled":
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            notes = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": notes}
    return (stored | {"scaled_fp8": torch.empty(0, dtype=FP8)} if note == "scaled" else stored), exact


def assert_is(model: torch.nn.Module, tensors: dict) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name].float(), tensor.float()), name


def assert_all(weights: WeightsFolder, dit: dict | None = None) -> None:
    weights.check(["dit", "encoder", "decoder", "text_encoder"])
    assert_is(weights.load_dit("cpu", torch.float32), dit or official("dit"))
    assert_is(weights.load_encoder("cpu", torch.float32), official("encoder"))
    assert_is(weights.load_decoder("cpu", torch.float32), official("decoder"))
    assert_t5(weights, t5())


def assert_t5(weights: WeightsFolder, expected: dict) -> None:
    model = weights.load_text_encoder("cpu", torch.float32).model
    state = model.state_dict()
    assert state.keys() - {"encoder.embed_tokens.weight"} == expected.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in expected.items())
    assert model.encoder.embed_tokens.weight is model.shared.weight


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory) -> Path:
    return make_comfyui(tmp_path_factory.mktemp("ComfyUI"), GOLDEN)


def test_the_models_in_a_comfyui_folder_are_found_among_others(comfyui):
    weights = WeightsFolder(comfyui / "models")
    assert_all(weights)
    assert_all(WeightsFolder(comfyui))
    assert weights.base_identity() == WeightsFolder(GOLDEN).base_identity()
    assert weights.load_tokenizer()("a cat").input_ids == WeightsFolder(TINY).load_tokenizer()("a cat").input_ids


def test_each_part_can_be_a_file(comfyui, tmp_path):
    models = comfyui / "models"
    paths = WeightsPaths(
        tmp_path / "nothing",
        models / "diffusion_models" / "mochi_preview_bf16.safetensors",
        models / "vae",
        models / "text_encoders" / "t5xxl_fp16.safetensors",
        TINY / "tokenizer",
    )
    for name in ("dit_config.json", "vae_config.json", "text_encoder_config.json"):
        for folder in ("diffusion_models", "vae", "text_encoders"):
            shutil.copy(models / name, models / folder)
    try:
        assert_all(WeightsFolder(paths))
    finally:
        for folder in ("diffusion_models", "vae", "text_encoders"):
            for path in (models / folder).glob("*.json"):
                path.unlink()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_one_file_holds_all(tmp_path, prefix):
    small_configs(tmp_path)
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    both = prefixed(official("encoder"), "vae.encoder.") | prefixed(official("decoder"), "vae.decoder.")
    text = prefixed(t5(), "text_encoders.t5xxl.transformer.") | {
        "text_encoders.t5xxl.logit_scale": torch.tensor(4.6055)
    }
    save_file(prefixed(official("dit"), prefix) | both | text, tmp_path / "all.safetensors")
    assert_all(WeightsFolder(tmp_path / "all.safetensors"))
    assert_all(WeightsFolder(tmp_path))
    left_over = {"left.over": torch.zeros(2)}
    save_file(prefixed(official("dit"), prefix) | both | text | left_over, tmp_path / "all.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown \(left\.over\)"):
        WeightsFolder(tmp_path).check(["dit"])


@pytest.mark.parametrize("note", ["scaled", "mixed", "rows"])
def test_scaled_fp8_is_multiplied_with_its_scales(tmp_path, note):
    small_configs(tmp_path)
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    in_blocks = lambda name: name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name  # noqa: E731
    stored, exact = scaled_fp8(official("dit"), in_blocks, note)
    save_file(prefixed(stored, "model.diffusion_model."), tmp_path / "dit_fp8.safetensors")
    text, exact_text = scaled_fp8({name: tensor.float() for name, tensor in t5().items()}, note=note)
    save_file(text, tmp_path / "t5_fp8.safetensors")
    weights = WeightsFolder(tmp_path)
    weights.check(["dit", "text_encoder"])
    assert_is(weights.load_dit("cpu", torch.float32), exact)
    assert_t5(weights, exact_text)
    rows = weights.read_fp8("blocks.0.attn.qkv_x.weight")
    assert rows is not None and rows[0].dtype == FP8
    assert torch.equal(rows[0].float() * rows[1], exact["blocks.0.attn.qkv_x.weight"])
    assert weights.read_fp8("t5_yproj.weight") is None


def test_fp8_without_scales_and_half_precision_are_numbers_as_they_are(tmp_path):
    for dtype in (FP8, torch.float8_e5m2, torch.float16):
        folder = small_configs(tmp_path / str(dtype))
        tensors = {name: tensor.to(dtype) for name, tensor in official("dit").items()}
        save_file(tensors, folder / "mochi.safetensors")
        expected = {name: tensor.float() for name, tensor in tensors.items()}
        assert_is(WeightsFolder(folder).load_dit("cpu", torch.float32), expected)
        assert ":" in WeightsFolder(folder).base_identity()


def test_the_first_complete_variant_is_read_or_the_one_that_is_named(tmp_path):
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("sha256.json", "dit*"))
    tensors, folder = t5(), tmp_path / "weights" / "text_encoder"
    half = {name: tensor * 2 for name, tensor in tensors.items()}
    names = list(tensors)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").rename(tmp_path / "plain.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # Of a file that is not there.
    save_file(half, folder / "model.bf16.safetensors")
    weights = WeightsFolder(tmp_path / "weights")
    weights.check(["text_encoder"])
    assert_t5(weights, half)
    shutil.copy(tmp_path / "plain.safetensors", folder / "model-00001-of-00001.safetensors")
    assert_t5(WeightsFolder(tmp_path / "weights"), tensors)
    chosen = WeightsFolder(WeightsPaths(tmp_path / "weights", variant="bf16"))
    assert_t5(chosen, half)
    # The features of two variants are not interchangeable.
    assert len({each.fingerprint("text_encoder") for each in (chosen, WeightsFolder(tmp_path / "weights"))}) == 2
    assert chosen.fingerprint("text_encoder") == weights.fingerprint("text_encoder")
    with pytest.raises(CheckpointError, match=r"neither model\.fp16\.safetensors"):
        WeightsFolder(WeightsPaths(tmp_path / "weights", variant="fp16")).check(["text_encoder"])


def save_transformer(folder: Path) -> Path:
    """Saves the small DiT as diffusers does, in a separate folder."""
    sizes = json.loads((GOLDEN / "dit_config.json").read_text())
    known = {name: value for name, value in sizes.items() if name in DiTConfig.__dataclass_fields__}
    model = build_meta_model(DiTConfig(**known))
    folder.mkdir(parents=True)
    save_file(to_diffusers(official("dit"), diffusers_map(model)), folder / "diffusion_pytorch_model.bf16.safetensors")
    config = model.config
    theirs = {"_class_name": "MochiTransformer3DModel", "patch_size": 2, "in_channels": 12, "num_layers": config.depth}
    theirs |= {"num_attention_heads": config.num_heads, "pooled_projection_dim": config.hidden_size_y}
    theirs |= {"attention_head_dim": config.hidden_size_x // config.num_heads, "text_embed_dim": config.t5_feat_dim}
    (folder / "config.json").write_text(json.dumps(theirs))
    return folder


def test_a_bare_folder_of_diffusers_is_read(tmp_path):
    folder = save_transformer(tmp_path / "mochi")
    for paths in (WeightsPaths(folder), WeightsPaths(tmp_path / "nothing", transformer=folder)):
        assert_is(WeightsFolder(paths).load_dit("cpu", torch.float32), official("dit"))
    with pytest.raises(CheckpointError, match=r"has no decoder\.safetensors or vae/ and no file with a VAE decoder"):
        WeightsFolder(folder).check(["decoder"])


# Faults of T5 that transformers accepts silently: it initialises missing tensors at random.
T5_FAULTS = {
    "prefix": lambda tensors: prefixed(tensors, "text_model."),
    "missing": lambda tensors: {k: v for k, v in tensors.items() if "block.1.layer.1.DenseReluDense.wo" not in k},
    "unknown": lambda tensors: tensors | {"encoder.block.2.layer.0.layer_norm.weight": torch.ones(64)},
    "shape": lambda tensors: tensors | {"shared.weight": torch.zeros(383, 64)},
}


@pytest.mark.parametrize("fault", T5_FAULTS)
def test_a_faulty_t5_is_read_correctly_or_refused(tmp_path, fault):
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("sha256.json"))
    save_file(T5_FAULTS[fault](t5()), tmp_path / "weights" / "text_encoder" / "model.safetensors")
    weights = WeightsFolder(tmp_path / "weights")
    if fault == "prefix":
        weights.check(["text_encoder"])
        assert_t5(weights, t5())
        # The fingerprint differs from that of versions without this check, whose cached features were wrong.
        assert weights.fingerprint("text_encoder") != unchecked_fingerprint(tmp_path / "weights")
        return
    for call in (lambda: weights.check(["text_encoder"]), lambda: weights.fingerprint("text_encoder")):
        with pytest.raises(
            CheckpointError, match=r"does not fit config\.json, which has 21 tensors: [12] (missing|unknown|of)"
        ):
            call()
    with pytest.raises(CheckpointError, match="does not fit"):
        weights.load_text_encoder("cpu", torch.float32)


def unchecked_fingerprint(folder: Path) -> str:
    from mochi_tune.weights.files import fingerprint_files

    files = [path for name in ("text_encoder", "tokenizer") for path in (folder / name).iterdir()]
    return fingerprint_files(folder, files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "9 missing"),
        ({"d_ff": 64}, "of another shape"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05 does not fit; in Mochi's T5 it is 1e-06"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance=64 does not fit"),
        ({"feed_forward_proj": "relu"}, "Mochi's text encoder is a t5 with gated-gelu"),
        ({"num_heads": "4"}, "num_heads='4' does not fit"),
    ],
)
def test_a_wrong_configuration_of_t5_is_one_line(tmp_path, change, message):
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("sha256.json"))
    path = tmp_path / "weights" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        WeightsFolder(tmp_path / "weights").check(["text_encoder"])


def tokenizer_json(*tokens: str, kind: str = "Unigram") -> dict[str, bytes]:
    vocabulary = [[each, 0.0] for each in tokens] if kind == "Unigram" else {each: i for i, each in enumerate(tokens)}
    return {"tokenizer.json": json.dumps({"model": {"type": kind, "vocab": vocabulary}}).encode()}


def sentencepiece(*tokens: str) -> dict[str, bytes]:
    pieces = (b"\n" + bytes([len(each)]) + each.encode() + b"\x15\0\0\0\0" for each in tokens)
    return {"spiece.model": b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces)}


T5_TOKENS = ("<pad>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("files", "has"),
    [
        (tokenizer_json("[PAD]", "[CLS]", "a", kind="WordPiece"), "no tokens of a Unigram model"),
        (tokenizer_json("<unk>", "<s>", "</s>", "a"), "4 tokens, from <unk> <s> </s> on"),
        # As UMT5, which has the first tokens of T5 but larger indices than the embedding has rows.
        (tokenizer_json(*T5_TOKENS, *map(str, range(400))), "403 tokens, from <pad> </s> <unk> on"),
        (sentencepiece(*T5_TOKENS, *map(str, range(400))), "403 tokens, from <pad> </s> <unk> on"),
        (sentencepiece("<unk>", "<s>", "</s>"), "3 tokens, from <unk> <s> </s> on"),
        ({"spiece.model": b"\n\xff"}, "no tokens of a Unigram model"),
        (tokenizer_json(*T5_TOKENS, "a"), None),
        (sentencepiece(*T5_TOKENS, "a"), None),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, files, has):
    (tmp_path / "tokenizer").mkdir()
    for name, content in files.items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    for folder in (tmp_path, tmp_path / "tokenizer"):
        weights = WeightsFolder(WeightsPaths(TINY, tokenizer=folder))
        if has is None:
            weights.check(["text_encoder"])
            continue
        with pytest.raises(CheckpointError, match=f"is not this T5's tokenizer: it has {has}, and T5 has at most 384"):
            weights.check(["text_encoder"])


def test_a_path_that_does_not_exist_is_named(tmp_path):
    nothing = tmp_path / "nothing.safetensors"
    for part, paths in (("dit", WeightsPaths(TINY, nothing)), ("decoder", WeightsPaths(TINY, vae=nothing))):
        with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist: use the file or the folder"):
            WeightsFolder(paths).check([part])
    with pytest.raises(CheckpointError, match=r"model\.tokenizer=.* has no spiece\.model or tokenizer\.json: name the"):
        WeightsFolder(WeightsPaths(TINY, tokenizer=nothing)).check(["text_encoder"])


def test_t5s_decoder_and_the_second_name_of_the_embedding_are_left_out(tmp_path):
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("sha256.json"))
    more = {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(64), "lm_head.weight": torch.ones(384, 64)}
    tensors = {name: tensor for name, tensor in t5().items() if name != "shared.weight"}
    tensors["encoder.embed_tokens.weight"] = t5()["shared.weight"]
    save_file(tensors | more, tmp_path / "weights" / "text_encoder" / "model.safetensors")
    weights = WeightsFolder(tmp_path / "weights")
    weights.check(["text_encoder"])
    assert_t5(weights, t5())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda stored: {k: v for k, v in stored.items() if not k.endswith("qkv_x.scale_weight")},
            "fp8 without a scale",
        ),
        (lambda stored: stored | {"t5_yproj.scale_weight": torch.ones(1)}, "1 unknown .t5_yproj.scale_weight"),
        (lambda stored: stored | {"blocks.0.mod_x.comfy_quant": note("nvfp4")}, "is stored as nvfp4"),
        (lambda stored: stored | {"blocks.0.mod_x.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "cannot be read"),
    ],
)
def test_unsupported_fp8_is_refused(tmp_path, fault, message):
    small_configs(tmp_path)
    stored, _ = scaled_fp8(official("dit"), lambda name: name.startswith("blocks.") and "norm" not in name)
    save_file(fault(stored), tmp_path / "mochi.safetensors")
    with pytest.raises(CheckpointError, match=message):
        WeightsFolder(tmp_path).check(["dit"])


def note(kind: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def test_several_files_with_one_part_ask_for_a_choice(comfyui, tmp_path):
    models = shutil.copytree(comfyui / "models", tmp_path / "models")
    source = models / "diffusion_models" / "mochi_preview_bf16.safetensors"
    shutil.copy(source, source.with_name("mochi_preview_fp8_scaled.safetensors"))
    with pytest.raises(CheckpointError, match=r"choose one with model\.transformer"):
        WeightsFolder(models).check(["dit"])
    with pytest.raises(CheckpointError, match=r"model\.vae=.*holds no VAE encoder of Mochi"):
        WeightsFolder(WeightsPaths(models, vae=source)).check(["encoder"])


def test_training_and_sampling_use_fp8_weights_without_conversion(tmp_path):
    small_configs(tmp_path)
    in_blocks = lambda name: name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name  # noqa: E731
    stored, exact = scaled_fp8(official("dit"), in_blocks)
    save_file(stored, tmp_path / "mochi.safetensors")
    weights = WeightsFolder(tmp_path)

    def number(dit, block) -> int:
        return next(i for i, each in enumerate(dit.blocks) if each is block)

    def shrink(apply):
        return lambda dit, block: apply(
            block, "fp8", lambda name: weights.read_fp8(f"blocks.{number(dit, block)}.{name}")
        )

    trained = weights.load_dit("cpu", torch.bfloat16, shrink(apply_precision))
    sampled = weights.load_dit("cpu", torch.bfloat16, shrink(apply_quantization))
    for name in ("attn.qkv_x", "mlp_x.w2"):
        expected = exact[f"blocks.1.{name}.weight"]
        eight_bit, quantized = (model.blocks[1].get_submodule(name) for model in (trained, sampled))
        # Both multiply in fp32, so that they differ by rounding.
        assert torch.allclose(dequantized(eight_bit), expected, rtol=2**-22, atol=0)
        weight = quantized.weight
        assert torch.allclose(weight.qdata.float() * weight.scale, expected, rtol=2**-22, atol=0)
        again = weights.load_dit("cpu", torch.bfloat16, lambda _, block: apply_precision(block, "fp8"))
        assert not torch.allclose(dequantized(again.blocks[1].get_submodule(name)), expected, rtol=2**-8, atol=0)


def test_weights_check_lists_the_parts_and_what_each_verb_lacks(comfyui, tmp_path):
    models = shutil.copytree(comfyui / "models", tmp_path / "models")
    done = run("weights", "check", f"model.weights={models}", f"model.tokenizer={TINY / 'tokenizer'}")
    assert done.returncode == 0 and done.stdout.endswith("train with eval videos: ready\nsample: ready\n"), done.stdout
    assert f"DiT: {models / 'diffusion_models' / 'mochi_preview_bf16.safetensors'}: 51 tensors in" in done.stdout
    with (models / "text_encoders" / "t5xxl_fp16.safetensors").open("r+b") as file:
        file.truncate(5000)
    (models / "vae" / "mochi_vae.safetensors").unlink()
    done = run("weights", "check", f"model.weights={models}")
    assert done.returncode == 1 and "t5xxl_fp16.safetensors is not a complete safetensors file" in done.stdout
    assert "prepare: lacks VAE encoder, T5\ntrain: ready\n" in done.stdout
    done = run("weights", "check", "model.weight=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.weight" in done.stderr


@pytest.mark.parametrize(("key", "value"), [("qk_norm", "layer_norm"), ("activation_fn", "geglu")])
def test_an_unsupported_configuration_of_diffusers_is_refused(tmp_path, key, value):
    folder = save_transformer(tmp_path / "mochi")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=f"{key}='{value}' is not Mochi's"):
        WeightsFolder(folder).check(["dit"])

import json
import shutil

import pytest
import torch
from helpers_diffusers import to_diffusers
from helpers_golden import GOLDEN, relative_error
from helpers_weights import LOADERS, TINY, changes, official, refused
from safetensors.torch import load_file, save_file

from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder, EncoderConfig, frames_to_pixels
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import diffusers_map

TINY_WEIGHTS = WeightsFolder(TINY)
DIT_SIZES = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 2,
    "pooled_projection_dim": 96,
    "text_embed_dim": 64,
    "max_sequence_length": 64,
}
VAE_SIZES = {
    "encoder_block_out_channels": (32, 64, 32, 64),
    "decoder_block_out_channels": (32, 64, 32, 64),
    "layers_per_block": (2, 1, 1, 2, 1),
}


@pytest.fixture(scope="module")
def diffusers_models():
    """Models of diffusers in the tiny sizes, with the weights of the reference converted by the map."""
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    transformer, vae = MochiTransformer3DModel(**DIT_SIZES), AutoencoderKLMochi(**VAE_SIZES)
    transformer.load_state_dict(converted("dit"), strict=True)
    vae.load_state_dict(converted("encoder") | converted("decoder"), strict=True)
    return transformer.eval(), vae.eval()


@pytest.fixture(scope="module")
def diffusers_folder(diffusers_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    for model, name in zip(diffusers_models, ("transformer", "vae"), strict=True):
        model.save_pretrained(folder / name, max_shard_size="1MB")
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 2
    return folder


def converted(part):
    tensors = {name: tensor.float() for name, tensor in official(part).items()}
    return to_diffusers(tensors, diffusers_map(LOADERS[part](WeightsFolder(GOLDEN), "cpu", torch.float32)))


def assert_close(ours, theirs):
    assert relative_error(ours, theirs) <= 2e-5


@pytest.mark.parametrize("part", LOADERS)
def test_a_sharded_diffusers_folder_holds_the_official_tensors(diffusers_folder, part):
    WeightsFolder(diffusers_folder).check([part])
    model = LOADERS[part](WeightsFolder(diffusers_folder), "cpu", torch.float32)
    expected = official(part)
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].float()), name


def test_a_pipeline_saved_as_a_variant_loads(diffusers_models, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    transformer, vae = diffusers_models
    encoder, tokenizer = T5EncoderModel.from_pretrained(TINY / "text_encoder"), TINY / "tokenizer"
    models = {"transformer": transformer, "vae": vae, "text_encoder": encoder}
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = MochiPipeline(**models, tokenizer=AutoTokenizer.from_pretrained(tokenizer), scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "saved", variant="bf16", max_shard_size="1MB")
    assert (tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors.index.bf16.json").exists()
    assert (tmp_path / "saved" / "text_encoder" / "model.bf16.safetensors").exists()
    weights = WeightsFolder(tmp_path / "saved")
    weights.check([*LOADERS, "text_encoder"])
    for part, load in LOADERS.items():
        expected = official(part)
        for name, tensor in load(weights, "cpu", torch.float32).state_dict().items():
            assert torch.equal(tensor, expected[name].float()), name
    features = [each.load_text_encoder("cpu", torch.float32).encode(["a cat"])[0] for each in (weights, TINY_WEIGHTS)]
    assert torch.equal(*features)


@pytest.mark.parametrize("options", [{"variant": "bf16"}, {"variant": "bf16", "max_shard_size": "1MB"}, {}])
def test_every_way_that_diffusers_names_its_files_loads(diffusers_models, tmp_path, options):
    transformer, _ = diffusers_models
    transformer.save_pretrained(tmp_path / "transformer", **options)
    for name, tensor in WeightsFolder(tmp_path).load_dit("cpu", torch.float32).state_dict().items():
        assert torch.equal(tensor, official("dit")[name].float()), name


@torch.no_grad()
def test_the_dit_agrees_with_diffusers(diffusers_models, diffusers_folder):
    io = load_file(GOLDEN / "dit_io.safetensors")
    transformer, _ = diffusers_models
    dit = WeightsFolder(diffusers_folder).load_dit("cpu", torch.float32)
    rows = {
        "one": (io["z"], io["y_feat"], io["y_mask"], io["sigma"]),
        "no prompt": (io["z"], io["null_feat"], torch.zeros_like(io["y_mask"]), io["sigma"]),
        "two": (io["batch_z"], io["batch_y_feat"], io["batch_y_mask"], io["batch_sigma"]),
        "long": (io["long_z"], io["y_feat"], io["y_mask"], io["sigma"]),
    }
    for z, features, mask, sigma in rows.values():
        theirs = transformer(z, features, (1 - sigma) * 1000, mask, return_dict=False)[0]
        assert_close(dit(z, sigma, features, mask), theirs)


@torch.no_grad()
def test_the_vae_agrees_with_diffusers(diffusers_models, diffusers_folder):
    io = load_file(GOLDEN / "vae_io.safetensors")
    _, vae = diffusers_models
    encoder = WeightsFolder(diffusers_folder).load_encoder("cpu", torch.float32)
    for frames in (io["video"], io["video"][:, :, :1]):
        pixels = frames_to_pixels(frames.permute(0, 2, 3, 4, 1))
        posterior = vae.encode(pixels).latent_dist
        mean, logvar = encoder(pixels)
        assert_close(mean, posterior.mean)
        assert_close(logvar, posterior.logvar)


@torch.no_grad()
def test_the_decoder_agrees_with_diffusers_beyond_the_first_frames(diffusers_models, diffusers_folder):
    # The official decoder drops t - 1 frames after each upsample, diffusers drops all five at the end. Until then, the
    # five affect 2 more frames for each later convolution: 2 of them at half, 6 at the full frame rate.
    _, vae = diffusers_models
    decoder = WeightsFolder(diffusers_folder).load_decoder("cpu", torch.float32)
    vae_latents = torch.randn(1, 12, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    reach = 2 * (2 * 2) + 6 * 2
    theirs = vae.decode(vae_latents, return_dict=False)[0]
    assert_close(decoder(vae_latents)[:, :, reach:], theirs[:, :, reach:])


@torch.no_grad()
def test_the_decoder_agrees_with_diffusers_made_to_drop_frames_after_each_upsample(diffusers_models, diffusers_folder):
    io = load_file(GOLDEN / "vae_io.safetensors")
    _, vae = diffusers_models
    decoder = WeightsFolder(diffusers_folder).load_decoder("cpu", torch.float32)
    hooks = [
        block.register_forward_hook(lambda block, _, out: (out[0][:, :, block.temporal_expansion - 1 :], out[1]))
        for block in vae.decoder.up_blocks
    ]
    theirs, _ = vae.decoder(io["lat"])
    for hook in hooks:
        hook.remove()
    assert_close(decoder(io["lat"]), theirs)


@pytest.mark.parametrize("part", LOADERS)
def test_the_map_there_and_back_is_the_identity(part):
    tensors = official(part)
    mapping = diffusers_map(LOADERS[part](WeightsFolder(GOLDEN), "cpu", torch.float32))
    theirs = to_diffusers(tensors, mapping)
    assert mapping.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = torch.empty_like(tensor)
        mapping[name].join(theirs.__getitem__, back)
        assert torch.equal(back, tensor), name


def test_the_full_size_maps_to_diffusers_names_and_shapes():
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    shapes = json.loads((GOLDEN / "full_size_keys.json").read_text())
    with torch.device("meta"):
        theirs = MochiTransformer3DModel().state_dict() | AutoencoderKLMochi().state_dict()
        models = {
            "dit": AsymmDiT(DiTConfig()),
            "encoder": Encoder(EncoderConfig()),
            "decoder": Decoder(DecoderConfig()),
        }
        ours = {}
        for part, model in models.items():
            tensors = {name: torch.empty(shape) for name, shape in shapes[part].items()}
            ours |= to_diffusers(tensors, diffusers_map(model))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_diffusers_folder_with_another_models_keys_is_refused(diffusers_folder, tmp_path):
    shutil.copytree(diffusers_folder, tmp_path, dirs_exist_ok=True)
    shards = {path: load_file(path) for path in (tmp_path / "vae").glob("*.safetensors")}
    shard, tensors = next((p, t) for p, t in shards.items() if any(name.startswith("decoder.") for name in t))
    lost = next(name for name in tensors if name.startswith("decoder."))
    tensors["quant_conv.weight"] = tensors.pop(lost)
    save_file(tensors, shard)
    message = refused(tmp_path, "decoder")
    assert f"1 missing ({lost})" in message and "1 unknown (quant_conv.weight)" in message
    assert "missing" not in refused(tmp_path, "encoder")


def test_a_shard_that_the_index_names_must_be_there(diffusers_folder, tmp_path):
    shutil.copytree(diffusers_folder, tmp_path, dirs_exist_ok=True)
    shard = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}, which diffusion_pytorch_model.safetensors.index.json names" in refused(tmp_path, "dit")
    for path in (tmp_path / "transformer").glob("*index.json"):
        path.write_text("{}")
    assert "no weight_map" in refused(tmp_path, "dit")


def test_a_fingerprint_depends_on_each_shard_and_the_identity_of_a_base_not_on_the_layout(diffusers_folder, tmp_path):
    shutil.copytree(diffusers_folder / "transformer", tmp_path / "transformer")
    assert WeightsFolder(tmp_path).base_identity() == WeightsFolder(GOLDEN).base_identity()
    for shard in (tmp_path / "transformer").glob("*.safetensors"):
        assert changes(tmp_path, "dit", shard)

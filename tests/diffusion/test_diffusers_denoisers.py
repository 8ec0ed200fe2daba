import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from tiny_diffusers import (
    noisy,
    tiny_text_models,
    tiny_text_unet,
    tiny_transformer,
    tiny_unet,
    tiny_vae,
)

from diffcal.diffusion.diffusers_denoisers import (
    DiTDenoiser,
    StableDiffusionDenoiser,
    UNet2DDenoiser,
    is_diffusers_source,
    load_diffusers_denoiser,
)
from diffcal.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    UnsafeCheckpointError,
)


def edit(path, **entries):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **entries}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that save_pretrained wrote; tests copy what they change."""
    root = tmp_path_factory.mktemp("models")
    DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(
        root / "unet"
    )
    tiny_unet(None).save_pretrained(root / "bare")
    EulerDiscreteScheduler().save_pretrained(root / "bare")
    DiTPipeline(tiny_transformer(), tiny_vae(), DDIMScheduler()).save_pretrained(root / "dit")
    # Published pipelines carry names here; save_pretrained does not write them.
    labels = {str(index): f"animal {index}, other name" for index in range(6)}
    edit(root / "dit" / "model_index.json", id2label=labels)
    return root


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("text")
    tokenizer, encoder = tiny_text_models(root / "vocabulary")
    StableDiffusionPipeline(
        tiny_vae(),
        encoder,
        tokenizer,
        tiny_text_unet(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "pipeline")
    return root / "pipeline"


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved / name, tmp_path / name)

    return copy


@torch.no_grad()
def test_unet_pipeline_folder(saved):
    denoiser = load_diffusers_denoiser(saved / "unet", class_names=["a", "b", "c", "d", "e"])
    direct = UNet2DDenoiser(tiny_unet(), DDPMScheduler(prediction_type="v_prediction"))
    assert isinstance(denoiser, UNet2DDenoiser)
    assert denoiser.class_names == ("a", "b", "c", "d", "e")
    assert denoiser.fingerprint == direct.fingerprint
    x, sigma = noisy((3, 8, 8), [0.1, 3.0])
    condition = denoiser.condition(torch.eye(5)[[1, 4]])
    assert torch.equal(denoiser(x, sigma, condition), direct(x, sigma, condition))


def test_bare_network_folder_with_its_scheduler(saved, copied):
    assert load_diffusers_denoiser(str(saved / "bare")).num_classes == 0
    folder = copied("bare")
    (folder / "scheduler").mkdir()
    (folder / "scheduler_config.json").rename(folder / "scheduler" / "scheduler_config.json")
    assert load_diffusers_denoiser(folder).sample_shape == (3, 8, 8)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(CheckpointError, match="no scheduler"):
        load_diffusers_denoiser(folder)


def test_pipeline_with_its_parts_in_the_folder_itself(copied):
    folder = copied("unet")
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    assert load_diffusers_denoiser(folder).num_classes == 5


@torch.no_grad()
def test_dit_pipeline_folder(saved, copied):
    denoiser = load_diffusers_denoiser(saved / "dit", dtype="bfloat16", decode_chunk=4)
    assert isinstance(denoiser, DiTDenoiser)
    assert denoiser.class_names[2] == "animal 2, other name"
    assert denoiser.dtype == torch.bfloat16
    assert denoiser.codec.chunk == 4
    direct = DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler())
    assert denoiser.fingerprint == direct.fingerprint
    # Earlier versions of diffusers wrote the class under another name.
    folder = copied("dit")
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    assert load_diffusers_denoiser(folder).fingerprint == direct.fingerprint


@torch.no_grad()
def test_stable_diffusion_pipeline_folder(text_folder, tmp_path):
    denoiser = load_diffusers_denoiser(
        text_folder, prompts=["a cat", "dog"], negative_prompt="bad", timesteps="integer"
    )
    tokenizer, encoder = tiny_text_models(tmp_path)
    direct = StableDiffusionDenoiser(
        tiny_text_unet(),
        tiny_vae(),
        DDIMScheduler(),
        tokenizer,
        encoder,
        ["a cat", "dog"],
        negative_prompt="bad",
    )
    assert isinstance(denoiser, StableDiffusionDenoiser)
    assert denoiser.fingerprint == direct.fingerprint
    x, sigma = noisy((4, 4, 4), [3.0])
    condition = denoiser.condition(torch.tensor([[0.4, 0.6]]))
    assert denoiser(x, sigma, condition).isfinite().all()
    with pytest.raises(ConfigError, match="needs a list of prompts"):
        load_diffusers_denoiser(text_folder)


def test_text_encoder_without_a_weight_is_refused(text_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(text_folder, tmp_path / "pipeline")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        load_diffusers_denoiser(folder, prompts=["cat"])


def test_hub_name_is_read_from_the_cache(saved, tmp_path):
    """The layout of the hub's cache, filled by hand, stands in for a download."""
    repository = tmp_path / "models--someone--tiny"
    commit = "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved / "unet", repository / "snapshots" / commit)
    offline = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert load_diffusers_denoiser("someone/tiny", **offline).num_classes == 5
    with pytest.raises(CheckpointError, match="'someone/other' is not a folder here"):
        load_diffusers_denoiser("someone/other", **offline)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt"])
def test_pickled_weights_are_refused_and_never_opened(copied, suffix):
    folder = copied("unet")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(b"would run code")
    with pytest.raises(UnsafeCheckpointError, match=r"pickle.*save_pretrained"):
        load_diffusers_denoiser(folder)


def test_a_pickle_beside_other_safetensors_is_not_taken_instead(copied):
    folder = copied("unet")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.with_suffix(".bin").write_bytes(b"would run code")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_diffusers_denoiser(folder)
    assert load_diffusers_denoiser(folder, variant="fp16").num_classes == 5


def test_weights_that_do_not_fit_the_config_are_refused(copied):
    from safetensors.torch import load_file, save_file

    folder = copied("unet")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    bias = tensors.pop("conv_in.bias")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        load_diffusers_denoiser(folder)
    save_file(
        {**tensors, "conv_in.bias": bias, "surplus": bias.clone()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="surplus"):
        load_diffusers_denoiser(folder)
    save_file({**tensors, "conv_in.bias": bias[:3]}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        load_diffusers_denoiser(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_diffusers_denoiser(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_diffusers_denoiser(folder)


@pytest.mark.parametrize(
    "name",
    [
        "LDMSuperResolutionPipeline",
        "StableDiffusionInpaintPipeline",
        "ScoreSdeVePipeline",
        "Mystery",
    ],
)
def test_other_pipelines_are_refused_by_name(copied, name):
    folder = copied("unet")
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(CheckpointError, match=f"is a {name}, which is not supported; supported"):
        load_diffusers_denoiser(folder)


def test_other_parts_are_refused_by_name(copied):
    folder = copied("dit")
    edit(folder / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(CheckpointError, match="is a VQModel; supported: AutoencoderKL"):
        load_diffusers_denoiser(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    shutil.copytree(copied("unet") / "unet", folder / "unet")
    edit(folder / "model_index.json", _class_name="DDPMPipeline")
    with pytest.raises(CheckpointError, match="FlowMatchEulerDiscreteScheduler"):
        load_diffusers_denoiser(folder)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model_index\.json"):
        load_diffusers_denoiser(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub name"):
        load_diffusers_denoiser(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_diffusers_denoiser(tmp_path)


def test_options_are_checked(saved, text_folder):
    unet = saved / "unet"
    with pytest.raises(ConfigError, match="did you mean 'timesteps'"):
        load_diffusers_denoiser(unet, timestep="integer")
    with pytest.raises(ConfigError, match="'prompts' has no meaning"):
        load_diffusers_denoiser(unet, prompts=["a cat"])
    with pytest.raises(ConfigError, match="'null_class' has no meaning"):
        load_diffusers_denoiser(text_folder, prompts=["a cat"], null_class=3)
    with pytest.raises(ConfigError, match="decode_chunk"):
        load_diffusers_denoiser(saved / "dit", decode_chunk=0)
    with pytest.raises(CheckpointError, match="revision 'main' is for hub names"):
        load_diffusers_denoiser(unet, revision="main")
    with pytest.raises((MissingExtraError, ConfigError), match="xformers"):
        load_diffusers_denoiser(unet, attention="xformers")
    denoiser = load_diffusers_denoiser(unet, null_class=4, sigma_data=0.4, timesteps="integer")
    assert (denoiser.num_classes, denoiser.sigma_data) == (4, 0.4)


def test_sources_are_recognised(saved, tmp_path):
    assert is_diffusers_source(saved / "unet")
    assert is_diffusers_source(saved / "bare")
    assert is_diffusers_source("someone/tiny")
    assert not is_diffusers_source(tmp_path)
    assert not is_diffusers_source("a/b/c")
    (tmp_path / "config.json").write_text("{}")
    assert not is_diffusers_source(tmp_path)

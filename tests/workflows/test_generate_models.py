"""Generation through every kind of model, from folders that diffusers wrote."""

import json
from importlib.util import find_spec

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    StableDiffusionPipeline,
)
from tiny_diffusers import (
    tiny_text_models,
    tiny_text_unet,
    tiny_transformer,
    tiny_unet,
    tiny_vae,
)

from diffcal.data.images import decode_image
from diffcal.diffusion.samplers import SamplerConfig
from diffcal.mixing.conditions import ConditionConfig
from diffcal.mixing.generation import GenerationConfig
from diffcal.mixing.plan import PlanConfig
from diffcal.workflows.generate import GenerateConfig, ModelConfig, generate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(root / "unet")
    DiTPipeline(tiny_transformer(), tiny_vae(), DDIMScheduler()).save_pretrained(root / "dit")
    if find_spec("transformers") is None:
        return root
    tokenizer, encoder = tiny_text_models(root / "tokens")
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=tiny_text_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "sd")
    return root


def run(folders, tmp_path, kind, mode, k=2, guidance=1.0):
    options = {"prompts": ["a cat", "an ape", "a bee"]} if kind == "sd" else {}
    weights = {} if k == 2 else {"weights": "dirichlet", "classes_per_mix": k}
    config = GenerateConfig(
        model=ModelConfig(source=str(folders / kind), options=options),
        plan=PlanConfig(groups=2, members=4, **weights),
        generation=GenerationConfig(
            sampler=SamplerConfig(solver="unipc_2", steps=3, guidance_scale=guidance),
            condition=ConditionConfig(mode=mode),
        ),
    )
    generate(config, tmp_path, device="cpu")
    rows = pq.read_table(tmp_path / "generated/shard-00000.parquet").to_pylist()
    manifest = json.loads((tmp_path / "generated/manifest.json").read_text())
    images = [
        torch.from_numpy(decode_image(row["image"]["bytes"], "image").astype("int32"))
        for row in rows
    ]
    return torch.stack(images), rows, manifest


@pytest.mark.parametrize(
    ("kind", "mode", "k", "guidance"),
    [
        ("unet", "label", 2, 1.0),
        ("unet", "score", 3, 1.0),
        ("dit", "label", 2, 1.5),
        ("dit", "schedule", 2, 1.0),
        ("sd", "label", 2, 2.0),
        ("sd", "embedding", 3, 1.0),
    ],
)
def test_members_lie_between_the_classes_of_a_model(folders, tmp_path, kind, mode, k, guidance):
    if kind == "sd":
        pytest.importorskip("transformers")
    images, rows, manifest = run(folders, tmp_path, kind, mode, k, guidance)
    assert images.shape == (8, 8, 8, 3)
    assert manifest["class_names"][0] == ("a cat" if kind == "sd" else "0")
    assert all(len(row["classes"]) == k for row in rows)
    assert all(abs(sum(row["weights"]) - 1) < 1e-6 for row in rows)
    assert (images[:4] != images[4:]).any()  # other noise, other classes
    again, _, _ = run(folders, tmp_path / "again", kind, mode, k, guidance)
    assert torch.equal(images, again)

"""Encoders: tiny real transformers models saved to disk, our classifiers, versions, bad input."""

import json

import numpy as np
import pytest
import torch

from diffcal.errors import CheckpointError, ConfigError, DataError, NumericalError
from diffcal.models.classifier import TrainedClassifier
from diffcal.models.encoders import (
    ClassifierEncoder,
    ConcatenatedEncoder,
    FeatureEncoder,
    NormalisedEncoder,
    PixelEncoder,
    classifier_encoder,
)
from diffcal.models.registry import build_classifier

transformers = pytest.importorskip("transformers")
from diffcal.models.encoders_transformers import (  # noqa: E402
    ImagePreparation,
    TransformersEncoder,
    load_transformers_encoder,
)

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 8,
}
PREPARATION = {
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def build(kind):
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=12)
        return transformers.CLIPModel(config), 12
    if kind == "siglip":
        config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
        return transformers.SiglipModel(config), 16
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**VISION, mlp_ratio=2)), 16
    return transformers.ViTModel(transformers.ViTConfig(**VISION)), 16


def saved(folder, kind, **changes):
    model, dim = build(kind)
    model.save_pretrained(folder)
    settings = {**PREPARATION, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model.eval(), dim


def images(count=3, height=24, width=24, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def expected(model, kind, pixels):
    """Straight from the model's parts, not through the method that differs between versions."""
    with torch.no_grad():
        if kind == "clip":
            return model.visual_projection(model.vision_model(pixels).pooler_output)
        if kind == "siglip":
            return model.vision_model(pixels).pooler_output
        return model(pixels).pooler_output


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_transformers_models_from_a_folder(tmp_path, kind):
    model, dim = saved(tmp_path, kind)
    encoder = load_transformers_encoder(tmp_path)
    assert isinstance(encoder, FeatureEncoder)
    features = encoder.encode(images())
    wanted = expected(model, kind, encoder.prepare(images()))
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-6)
    assert features.dtype == torch.float32
    assert encoder.dim == dim == features.shape[1]
    single = torch.cat([encoder.encode(images()[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, features, rtol=1e-4, atol=1e-6)
    again = load_transformers_encoder(str(tmp_path))
    assert again.version == encoder.version
    half = load_transformers_encoder(tmp_path, dtype="bfloat16").encode(images())
    torch.testing.assert_close(half, features, rtol=0.1, atol=0.1)


def test_both_return_conventions_of_get_image_features():
    """A tensor in transformers 4, an output object in 5; the same model behind both."""
    model, _ = build("clip")
    model.eval()
    prepare = ImagePreparation(PREPARATION)
    wanted = expected(model, "clip", prepare(images()))

    class Version(torch.nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.model, self.wrap = model, wrap

        def get_image_features(self, pixel_values):
            return self.wrap(expected(self.model, "clip", pixel_values))

    output = transformers.modeling_outputs.BaseModelOutputWithPooling
    for wrap in (lambda v: v, lambda v: output(pooler_output=v)):
        features = TransformersEncoder(Version(wrap), prepare, "x").encode(images())
        torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="gives no image embedding"):
        TransformersEncoder(Version(lambda v: output()), prepare, "x").encode(images())


def test_a_pooler_without_weights_is_not_believed(tmp_path):
    """DINO's checkpoints lack the pooling layer of ViTModel: the first token serves, every time."""
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    first, second = (load_transformers_encoder(tmp_path) for _ in range(2))
    pixels = first.prepare(images())
    with torch.no_grad():
        token = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(first.encode(images()), token, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.encode(images()), second.encode(images()))


def test_missing_weights_and_missing_models_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "vit")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights"):
        load_transformers_encoder(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_transformers_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        load_transformers_encoder(tmp_path / "nowhere")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_transformers_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": 16}, (31, 24)),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": 16}, (24, 37)),
        ("SiglipImageProcessorPil", {"size": {"height": 16, "width": 16}}, (31, 24)),
        ("ViTImageProcessorPil", {"size": {"height": 16, "width": 16}, "resample": 2}, (24, 24)),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": 16}, (28, 28)),
    ],
)
def test_preparation_is_that_of_the_library(name, settings, size):
    processor_class = getattr(transformers, name, None) or getattr(
        transformers, name.removesuffix("Pil")
    )
    processor = processor_class(**settings)
    content = json.loads(processor.to_json_string())
    batch = images(2, *size)
    wanted = processor([image.numpy() for image in batch], return_tensors="pt")["pixel_values"]
    found = ImagePreparation(content)(batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_grey_images_become_coloured():
    prepare = ImagePreparation(PREPARATION)
    grey = images(channels=1)
    torch.testing.assert_close(prepare(grey), prepare(grey.expand(-1, -1, -1, 3)))
    with pytest.raises(ConfigError, match="4 channels"):
        prepare(images(channels=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"size": {"longest_edge": 5}}, "size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 5}}, "crop"),
    ],
)
def test_preparations_that_are_not_understood(changes, message):
    with pytest.raises(ConfigError, match=message):
        ImagePreparation({**PREPARATION, **changes})


# our own encoders


def classifier(mean=0.5):
    torch.manual_seed(0)
    return TrainedClassifier(
        module=build_classifier("cnn-tiny", 4, 3, 16).eval(),
        mean=torch.full((3,), mean),
        std=torch.full((3,), 0.25),
        class_names=tuple("abcd"),
        image_shape=(16, 16, 3),
        architecture="cnn-tiny",
    )


def test_penultimate_features_of_a_classifier():
    trained = classifier()
    encoder = classifier_encoder(trained)
    pixels = images(5, 16, 16)
    torch.testing.assert_close(encoder.encode(pixels), trained.features(pixels))
    assert encoder.dim == encoder.encode(pixels).shape[1]
    logits = trained.module.fc(encoder.encode(pixels))
    torch.testing.assert_close(logits, trained.logits(pixels), rtol=1e-5, atol=1e-6)


def test_versions_change_with_weights_layer_and_normalisation():
    base = classifier_encoder(classifier()).version
    assert classifier_encoder(classifier()).version == base
    other = classifier()
    with torch.no_grad():
        other.module.fc.bias[0] += 1e-3
    versions = {
        base,
        classifier_encoder(other).version,
        classifier_encoder(classifier(mean=0.4)).version,
        classifier_encoder(classifier(), "stages.0").version,
        NormalisedEncoder(classifier_encoder(classifier())).version,
    }
    assert len(versions) == 5


def test_layers_of_any_network():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 3)
    )

    def preprocess(x):
        return x.permute(0, 3, 1, 2).float() / 255

    with pytest.raises(ConfigError, match="no linear layer"):
        ClassifierEncoder(network, preprocess)
    with pytest.raises(ConfigError, match="no layer 'head'"):
        ClassifierEncoder(network, preprocess, "head")
    encoder = ClassifierEncoder(network, preprocess, "2")
    with pytest.raises(ConfigError, match="shows when it first runs"):
        _ = encoder.dim
    pixels = images(2, 8, 8)
    wanted = network[1](network[0](preprocess(pixels))).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.encode(pixels), wanted.detach())
    assert encoder.dim == 6
    unused = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})
    unused.forward = lambda x: x
    with pytest.raises(ConfigError, match="did not run"):
        ClassifierEncoder(unused, preprocess).encode(pixels)
    with torch.no_grad():
        network[0].weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="classifier features"):
        encoder.encode(pixels)


def test_pixels_unit_vectors_and_concatenation():
    pixels = PixelEncoder((4, 4, 1))
    batch = images(3, 4, 4, 1)
    features = pixels.encode(batch)
    np.testing.assert_allclose(features.numpy(), batch.numpy().reshape(3, 16) / 127.5 - 1, 1e-6)
    unit = NormalisedEncoder(pixels)
    torch.testing.assert_close(unit.encode(batch).norm(dim=1), torch.ones(3))
    both = ConcatenatedEncoder(pixels, unit)
    assert both.dim == 32
    torch.testing.assert_close(both.encode(batch)[:, :16], features)
    assert both.name == "pixels+pixels-unit"
    assert len({pixels.version, unit.version, both.version}) == 3
    with pytest.raises(DataError, match=r"\[4, 4, 3\]"):
        pixels.encode(images(1, 4, 4, 3))
    with pytest.raises(ConfigError, match="at least one"):
        ConcatenatedEncoder()

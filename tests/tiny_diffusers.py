"""Tiny real diffusers models, built from configs with fixed seeds (a few thousand parameters each)."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

SEQUENCE = 16  # tokens that the tiny text encoder reads


def tiny_unet(num_class_embeds=5, **changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": num_class_embeds,
    }
    return UNet2DModel(**{**config, **changes}).eval()


def tiny_transformer(**changes):
    torch.manual_seed(1)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 4,
        "num_embeds_ada_norm": 6,
    }
    return DiTTransformer2DModel(**{**config, **changes}).eval()


def tiny_vae(**changes):
    torch.manual_seed(2)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 8,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def tiny_text_unet(**changes):
    torch.manual_seed(3)
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_text_models(folder: Path, width: int = 16):
    """CLIP tokenizer with a vocabulary of letters, written to ``folder``, and a text encoder for it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    settings = {"model_max_length": SEQUENCE, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(4)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=SEQUENCE,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )
    )
    return CLIPTokenizer.from_pretrained(folder), encoder.eval()


def noisy(shape, sigmas, seed=0):
    """A batch at the given noise levels: (x [b, c, h, w], sigma [b])."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.as_tensor(sigmas, dtype=torch.float32)
    size = (len(sigma), *shape)
    clean = torch.rand(size, generator=generator) * 2 - 1
    return clean + sigma[:, None, None, None] * torch.randn(size, generator=generator), sigma

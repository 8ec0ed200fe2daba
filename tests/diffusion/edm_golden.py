"""What the golden files of EDM networks hold, read once, and networks built from them."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffcal.diffusion.edm_networks import build_network

GOLDEN = Path(__file__).parents[1] / "golden"
NETS = json.loads((GOLDEN / "edm_nets.json").read_text("utf-8"))
KEYS = json.loads((GOLDEN / "edm_keys.json").read_text("utf-8"))
SAMPLE = json.loads((GOLDEN / "edm_sample.json").read_text("utf-8"))


@functools.cache
def tensors():
    return load_file(GOLDEN / "edm_nets.safetensors")


@functools.cache
def sample_tensors():
    return load_file(GOLDEN / "edm_sample.safetensors")


def under(prefix):
    """Tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors().items() if k.startswith(prefix)}


def named(key):
    return None if key is None else tensors()[key]


def network(name, dtype=torch.float32):
    """The golden network ``name`` with its weights, in evaluation mode."""
    entry = NETS["nets"][name]
    net = build_network({"preconditioner": entry["precond"], "kwargs": entry["kwargs"]})
    net.load_state_dict(under(entry["prefix"]))
    return net.eval().to(dtype)

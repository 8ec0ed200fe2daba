"""Every method as settings: ``features`` for the featuriser, ``scores`` for the scorer.

    config_from_dict(FeatureConfig, PRESETS["dtrak"]["features"])
    config_from_dict(ScoreConfig, PRESETS["dtrak"]["scores"])

``inputs`` says what the rows are: ``gradients`` of the model as ``features`` describes them, ``pixels``
or ``encoder`` embeddings of the images, or the losses of retrained subset models
(``subset-losses``). ``checkpoints`` are the shares of training at which features are taken (scores
are averaged over them with equal weights), and ``queries`` says whether the query features come from
the images themselves or from the path of the sampler that made them.
"""

from typing import Any

from diffcal.attribution.damping_selection import OFFICIAL_DAMPINGS

__all__ = ["PRESETS"]

_FINAL = {"inputs": "gradients", "checkpoints": [1.0], "queries": "images"}

# Gaussian entries of variance 1, as traker draws them: absolute dampings refer to this scale.
_PUBLISHED_SKETCH = {"kind": "gaussian", "dim": 32768, "seed": 42, "unit_variance": True}

_LOSS_FEATURES: dict[str, Any] = {
    "functional": "loss",
    "timesteps": 10,
    "strategy": "uniform",
    "noise": "slot",
    "noise_seed": 0,
    "slot_batch": 52,
    "normalise": False,
    "combine": "mean",
    "projection": _PUBLISHED_SKETCH,
}

_TRAK_SCORES: dict[str, Any] = {
    "method": "kernel",
    "norm": "none",
    "residual": "none",
    "leverage": False,
    "readout": "signed",
    "damping": 2000.0,
    "damping_rule": "absolute",
    "damping_grid": OFFICIAL_DAMPINGS,
}

_DAS_FEATURES: dict[str, Any] = {
    "functional": "all-outputs",
    "combine": "stack",
    "timesteps": 10,
    "strategy": "uniform",
    "noise": "shared",
    "noise_seed": 0,
    "normalise": True,
    "projection": {"kind": "sjlt", "dim": 4096, "seed": 0},
}

_DAS_SCORES: dict[str, Any] = {
    "method": "kernel",
    "norm": "none",
    "residual": "none",
    "leverage": False,
    "readout": "square",
    "damping": 20.0,
    "damping_rule": "rest",
}

PRESETS: dict[str, dict[str, Any]] = {
    # diffcal's default: all outputs at once by the output layer, which takes a forward pass, common
    # random numbers, timesteps side by side, and a damping without the part that features share.
    "das": {"features": _DAS_FEATURES, "scores": _DAS_SCORES, **_FINAL},
    # The same kernel estimated by random signs of the output, for gradients of any parameters: for
    # networks that end in no linear layer and for adapters. It gains with every timestep.
    "das-signs": {
        "features": {**_DAS_FEATURES, "functional": "random-signs"},
        "scores": _DAS_SCORES,
        **_FINAL,
    },
    # The release's functional with common random numbers, a sparse sketch and a relative damping.
    "das-mean": {
        "features": {**_DAS_FEATURES, "functional": "mean", "combine": "mean"},
        "scores": {**_DAS_SCORES, "damping": 0.1, "damping_rule": "relative"},
        **_FINAL,
    },
    # The DAS release (arXiv:2410.18639): noise by place in a batch of 16, dense sketch, the residual
    # that its normalisation makes inert, no leverage, absolute dampings.
    "das-official": {
        "features": {
            "functional": "mean",
            "timesteps": 10,
            "strategy": "released",
            "noise": "slot",
            "noise_seed": 0,
            "slot_batch": 16,
            "normalise": True,
            "combine": "mean",
            "projection": {"kind": "gaussian", "dim": 4096, "seed": 42, "unit_variance": True},
        },
        "scores": {
            **_TRAK_SCORES,
            "residual": "released",
            "readout": "square",
            "damping": 10.0,
        },
        **_FINAL,
    },
    # D-TRAK (arXiv:2311.00500): mean square of the output, gradients not normalised, signed.
    "dtrak": {
        "features": {**_LOSS_FEATURES, "functional": "mean-squared-l2-norm"},
        "scores": _TRAK_SCORES,
        **_FINAL,
    },
    # TRAK (arXiv:2303.14186) with the diffusion loss as its output function.
    "trak": {"features": _LOSS_FEATURES, "scores": _TRAK_SCORES, **_FINAL},
    "journey-trak": {
        "features": _LOSS_FEATURES,
        "scores": _TRAK_SCORES,
        "inputs": "gradients",
        "checkpoints": [1.0],
        "queries": "sampling-path",
    },
    "relative-influence": {
        "features": _LOSS_FEATURES,
        "scores": {**_TRAK_SCORES, "norm": "relative"},
        **_FINAL,
    },
    "renormalised-influence": {
        "features": _LOSS_FEATURES,
        "scores": {**_TRAK_SCORES, "norm": "renormalised"},
        **_FINAL,
    },
    # Influence with an eigenvalue-corrected Kronecker factorisation (arXiv:2410.13850): the damping is
    # part of the features.
    "ekfac": {
        "features": {
            **_LOSS_FEATURES,
            "noise": "independent",
            "projection": {"kind": "sjlt", "dim": 4096, "seed": 0},
            "curvature": {"kind": "ekfac"},
        },
        "scores": {"method": "dot", "readout": "signed"},
        **_FINAL,
    },
    "gradient-dot": {
        "features": _LOSS_FEATURES,
        "scores": {"method": "dot", "readout": "signed"},
        **_FINAL,
    },
    "gradient-cosine": {
        "features": _LOSS_FEATURES,
        "scores": {"method": "cosine", "readout": "signed"},
        **_FINAL,
    },
    "tracincp": {
        "features": _LOSS_FEATURES,
        "scores": {"method": "dot", "readout": "signed"},
        "inputs": "gradients",
        "checkpoints": [0.25, 0.5, 0.75, 1.0],
        "queries": "images",
    },
    "gas": {
        "features": _LOSS_FEATURES,
        "scores": {"method": "cosine", "readout": "signed"},
        "inputs": "gradients",
        "checkpoints": [0.25, 0.5, 0.75, 1.0],
        "queries": "images",
    },
    "pixel-dot": {"inputs": "pixels", "scores": {"method": "dot", "readout": "signed"}},
    "pixel-cosine": {"inputs": "pixels", "scores": {"method": "cosine", "readout": "signed"}},
    "encoder-dot": {"inputs": "encoder", "scores": {"method": "dot", "readout": "signed"}},
    "encoder-cosine": {"inputs": "encoder", "scores": {"method": "cosine", "readout": "signed"}},
    "empirical-influence": {
        "inputs": "subset-losses",
        "scores": {"method": "dot", "readout": "signed"},
    },
    "datamodel": {"inputs": "subset-losses", "scores": {"method": "dot", "readout": "signed"}},
}

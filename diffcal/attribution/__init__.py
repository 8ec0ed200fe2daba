"""DAS: which training images matter for a generated image, how much, and how far to trust it.

Gradients of a network's output become feature rows (``featurise``), a store keeps them, a kernel turns
them into scores, and the linear datamodeling score tells whether the scores predict what retraining
does. Scores are ``[queries, training examples]``; larger means that the example matters more.
"""

from diffcal.attribution.baselines import (
    cosine_blocks,
    dot_blocks,
    gas_blocks,
    gaussian_blocks,
    tracin_blocks,
)
from diffcal.attribution.counterfactual import (
    Effect,
    PairedEffect,
    embedding_cosine,
    paired_effect,
    pixel_distance,
    random_removals,
    removal_effect,
)
from diffcal.attribution.damping_selection import (
    DIMENSION_DAMPINGS,
    OFFICIAL_DAMPINGS,
    RELATIVE_DAMPINGS,
    DampingChoice,
    choose_damping,
    path_predictions,
)
from diffcal.attribution.datamodels import datamodel_scores, empirical_influence
from diffcal.attribution.ensemble import ScoredModel, ensemble_scores
from diffcal.attribution.feature_shards import shard_ranges
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.gram import GramAccumulator
from diffcal.attribution.groups import GroupShares, group_shares
from diffcal.attribution.journey import journey_features, path_features, renoised_path
from diffcal.attribution.kernel import Kernel, fit_kernel, load_kernel
from diffcal.attribution.kernel_updates import UpdatedKernel, update_kernel
from diffcal.attribution.lds import (
    LDS,
    Spread,
    average_losses,
    centre_batches,
    lds_difference,
    linear_datamodeling_score,
    predictions_of,
    stream_predictions,
)
from diffcal.attribution.lds_controls import lds_controls
from diffcal.attribution.lds_folds import cross_fitted_lds, rest_of, subset_folds
from diffcal.attribution.leave_one_out import RidgeLeaveOneOut, exact_das, ridge_leave_one_out
from diffcal.attribution.likeness import EncodedRows
from diffcal.attribution.memorisation import (
    MemorisationReport,
    exceedance,
    flag_beyond,
    flag_memorised,
    memorisation_report,
    memorisation_thresholds,
)
from diffcal.attribution.presets import PRESETS
from diffcal.attribution.projection import ProjectionConfig, Projector, project_rows
from diffcal.attribution.projectors import make_projector
from diffcal.attribution.readouts import READOUTS
from diffcal.attribution.residuals import RESIDUALS, residual_weights
from diffcal.attribution.score_config import ScoreConfig, score_features
from diffcal.attribution.scores import (
    ScoreBlock,
    average_blocks,
    collect,
    kernel_scores,
    leverage_scores,
    score_blocks,
    score_path,
)
from diffcal.attribution.screening import candidate_scores
from diffcal.attribution.subsets import leave_out_masks, subset_masks
from diffcal.attribution.topk import TopScores, top_scores

__all__ = [
    # sketches and features
    "FeatureStore",
    "ProjectionConfig",
    "Projector",
    "make_projector",
    "project_rows",
    "shard_ranges",
    # kernel and scores
    "PRESETS",
    "READOUTS",
    "RESIDUALS",
    "GramAccumulator",
    "Kernel",
    "ScoreBlock",
    "ScoreConfig",
    "ScoredModel",
    "TopScores",
    "UpdatedKernel",
    "average_blocks",
    "candidate_scores",
    "collect",
    "ensemble_scores",
    "fit_kernel",
    "kernel_scores",
    "leverage_scores",
    "load_kernel",
    "residual_weights",
    "score_blocks",
    "score_features",
    "score_path",
    "top_scores",
    "update_kernel",
    # baselines
    "EncodedRows",
    "cosine_blocks",
    "datamodel_scores",
    "dot_blocks",
    "empirical_influence",
    "gas_blocks",
    "gaussian_blocks",
    "journey_features",
    "path_features",
    "renoised_path",
    "tracin_blocks",
    # proof
    "LDS",
    "OFFICIAL_DAMPINGS",
    "DIMENSION_DAMPINGS",
    "RELATIVE_DAMPINGS",
    "DampingChoice",
    "Effect",
    "PairedEffect",
    "RidgeLeaveOneOut",
    "Spread",
    "average_losses",
    "centre_batches",
    "choose_damping",
    "cross_fitted_lds",
    "embedding_cosine",
    "exact_das",
    "lds_controls",
    "lds_difference",
    "leave_out_masks",
    "linear_datamodeling_score",
    "paired_effect",
    "path_predictions",
    "pixel_distance",
    "predictions_of",
    "random_removals",
    "removal_effect",
    "rest_of",
    "ridge_leave_one_out",
    "stream_predictions",
    "subset_folds",
    "subset_masks",
    # uses
    "GroupShares",
    "MemorisationReport",
    "exceedance",
    "flag_beyond",
    "flag_memorised",
    "group_shares",
    "memorisation_report",
    "memorisation_thresholds",
]

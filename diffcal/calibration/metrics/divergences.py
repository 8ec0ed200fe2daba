"""How far predicted distributions lie from soft labels."""

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.soft_label import (
    entropies,
    hellinger,
    soft_cross_entropy,
    squared_distance,
    total_variation,
)
from diffcal.errors import DataError

__all__ = ["SOFT_MEASURES", "soft_label_divergences"]

SOFT_MEASURES: tuple[str, ...] = (
    "cross_entropy",
    "kl",
    "reverse_kl",
    "js",
    "total_variation",
    "squared_distance",
    "hellinger",
    "label_entropy",
    "prediction_entropy",
    "top1_agreement",
)


def soft_label_divergences(predictions: Predictions) -> dict[str, float]:
    """Means over the examples of distances between soft labels q and predictions p.

    ``cross_entropy`` = -Σ q log p; ``kl`` = KL(q‖p), ``reverse_kl`` = KL(p‖q) and ``js``
    (Jensen-Shannon, at most log 2) in nats; ``total_variation`` = ½ Σ|p - q|; ``squared_distance`` =
    Σ (p - q)²; ``hellinger`` distance in [0, 1]; the mean entropies of q and p in nats;
    ``top1_agreement``: share of examples whose argmax agree. Infinite where q or p excludes what the
    other allows.

    Raises:
        DataError: the labels are hard.
    """
    if predictions.soft_labels is None:
        raise DataError(
            "divergences need soft_labels; with hard labels use the NLL and Brier score"
        )
    soft = predictions.soft_labels

    def make() -> dict[str, float]:
        total: dict[str, float] = dict.fromkeys(SOFT_MEASURES, 0.0)
        for rows in predictions.row_blocks():
            q, p = soft[rows].double(), predictions.probs(rows)
            q = q / q.sum(dim=1, keepdim=True)
            for name, values in _block(q, p).items():
                total[name] += float(values.sum())
            agree = q.argmax(dim=1) == predictions.predicted[rows]
            total["top1_agreement"] += float(agree.sum())
        return {name: value / len(predictions) for name, value in total.items()}

    return predictions.cached("divergences", make)


def _block(q: Float[Tensor, "b k"], p: Float[Tensor, "b k"]) -> dict[str, Tensor]:
    # the entropies are needed three times, so that divergences are made of them here
    cross, entropy_q, entropy_p = soft_cross_entropy(q, p), entropies(q), entropies(p)
    return {
        "cross_entropy": cross,
        "kl": cross - entropy_q,
        "reverse_kl": soft_cross_entropy(p, q) - entropy_p,
        "js": entropies((q + p) / 2) - (entropy_q + entropy_p) / 2,
        "total_variation": total_variation(q, p),
        "squared_distance": squared_distance(q, p),
        "hellinger": hellinger(q, p),
        "label_entropy": entropy_q,
        "prediction_entropy": entropy_p,
    }

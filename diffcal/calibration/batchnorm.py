"""Running BatchNorm statistics that do not see some of the batches."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["running_statistics_kept"]


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within, BatchNorm in training mode uses the batch's statistics and leaves the averages alone.

    Source: the auxiliary statistics of Xie et al. 2020 (arXiv:1911.09665), with shared scale and
    shift; only the main statistics are used at test, so the others need not be kept.
    """
    tracking = [
        layer
        for layer in module.modules()
        if isinstance(layer, _NormBase) and layer.track_running_stats
    ]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True

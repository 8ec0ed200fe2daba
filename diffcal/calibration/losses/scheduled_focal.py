"""Focal loss whose gamma falls during training."""

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Contract
from diffcal.calibration.losses.epoch_loss import EpochEnd, EpochLoss
from diffcal.calibration.losses.expectation import check_gamma
from diffcal.calibration.losses.focal import focal
from diffcal.errors import ConfigError

__all__ = ["ScheduledFocal"]


class ScheduledFocal(EpochLoss):
    """Focal loss with gamma 5, then 3, then 1, each from a share of the run on.

    Args:
        gammas: One more than ``shares``; the calibration studies also use 5, 3, 2.
        shares: Ascending, in (0, 1): by default epochs 100 and 250 of 350 (30 and 70 of 100 on
            Tiny-ImageNet).
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        ConfigError: lengths that do not fit, shares not ascending in (0, 1), negative gamma.

    Source: released code of Mukhoti et al. 2020 (arXiv:2002.09437).
    """

    progress: Tensor

    def __init__(
        self,
        gammas: Sequence[float] = (5.0, 3.0, 1.0),
        shares: Sequence[float] = (100 / 350, 250 / 350),
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        if len(gammas) != len(shares) + 1:
            raise ConfigError(f"{len(shares)} shares need {len(shares) + 1} gammas")
        if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
            raise ConfigError(f"shares must ascend within (0, 1), got {list(shares)}")
        self.gammas = tuple(check_gamma(gamma) for gamma in gammas)
        self.shares = tuple(shares)
        self.register_buffer("progress", torch.zeros(()))
        self.register_load_state_dict_post_hook(_settle_after_loading)  # type: ignore[arg-type]
        self._settle()

    @property
    def gamma(self) -> float:
        """The present gamma."""
        return self.gammas[self._stage]

    def _settle(self) -> None:
        # a plain number beside the buffer: a compiled graph cannot depend on a tensor's value
        progress = float(self.progress)
        # a float32 of 100 / 350 must count as having reached it
        self._stage = sum(progress >= share - 1e-6 for share in self.shares)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """Focal loss of ``targets``, hard or soft, with the present gamma."""
        return focal(logits, targets, gamma=self.gamma, **self.contract())

    def end_epoch(self, end: EpochEnd) -> None:
        self.progress.fill_(end.progress)
        self._settle()


def _settle_after_loading(module: ScheduledFocal, _: object) -> None:
    # by name, because a module with a lambda cannot be pickled
    module._settle()

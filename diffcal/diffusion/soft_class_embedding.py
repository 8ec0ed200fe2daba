"""Class embeddings that take weights over classes where the original takes integers only."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["SoftEmbedding", "SoftLabelEmbedding"]


class SoftEmbedding(nn.Embedding):
    """``nn.Embedding`` that also takes rows of weights: ``weights @ weight``.

    Integers are looked up exactly as before, bit for bit, and a one-hot row of floats gives the same
    row of the table. The parameter is shared with the wrapped table and keeps its name, so state
    dicts, optimisers and saved files do not change.

    Args:
        embedding: The table [k, d] to wrap.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
            _weight=embedding.weight.detach(),
        )
        self.weight = embedding.weight
        self.train(embedding.training)

    def forward(self, input: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
        """Embedding of integer classes [b], or of float weights over classes [b, k]."""
        if not input.is_floating_point():
            return super().forward(input)
        # A lookup is not rounded under autocast, so neither is a mixture of rows.
        with torch.autocast(self.weight.device.type, enabled=False):
            return input.to(self.weight.dtype) @ self.weight


class SoftLabelEmbedding(nn.Module):
    """Label embedding of a diffusion transformer that also takes weights over classes.

    Takes the place of diffusers' ``LabelEmbedding``: the table has one more row than there are
    classes where the network was trained with label dropout (the null class), and in training mode
    labels are replaced by it with probability ``dropout_prob``, for integers with the same random
    draw as the original.

    Args:
        embedding_table: The table [k, d] or, with a null class, [k + 1, d].
        num_classes: Number of classes k, the null class not counted.
        dropout_prob: Share of labels that training drops.
    """

    def __init__(
        self, embedding_table: nn.Embedding, num_classes: int, dropout_prob: float
    ) -> None:
        super().__init__()
        self.embedding_table = SoftEmbedding(embedding_table)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.train(embedding_table.training)

    def forward(
        self, labels: Int[Tensor, " b"] | Float[Tensor, "b k"], force_drop_ids: Tensor | None = None
    ) -> Float[Tensor, "b d"]:
        """Embedding of integer labels [b] or of weights [b, k], where k is the number of table rows.

        Args:
            labels: Classes, or weights over the table's rows.
            force_drop_ids: 1 where the label is to be replaced by the null class.
        """
        if force_drop_ids is not None:
            return self.embedding_table(self._dropped(labels, force_drop_ids == 1))
        if self.training and self.dropout_prob > 0:
            drawn = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            return self.embedding_table(self._dropped(labels, drawn))
        return self.embedding_table(labels)

    def _dropped(self, labels: Tensor, dropped: Tensor) -> Tensor:
        if not labels.is_floating_point():
            return torch.where(dropped, self.num_classes, labels)
        null = torch.zeros_like(labels)
        null[:, self.num_classes] = 1
        return torch.where(dropped[:, None], null, labels)

"""What can be compared of two curvatures."""


def diagonal(block):
    """Of ``Q Λ Qᵀ`` in the basis of the entries: eigenvectors of equal values may differ."""
    values = block.eigenvalues
    if block.left is not None:
        values = block.left.square() @ values
    return values if block.right is None else values @ block.right.square().mT

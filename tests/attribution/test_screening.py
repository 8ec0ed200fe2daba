"""Candidates score exactly what they score among all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.baselines import cosine_blocks
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.scores import kernel_scores
from diffcal.attribution.screening import candidate_scores
from diffcal.attribution.topk import top_scores
from diffcal.errors import DataError


@settings(deadline=None, max_examples=15)
@given(block_rows=st.integers(1, 25), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_candidates_score_what_they_score_among_all(block_rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, queries = torch.randn(21, 6, generator=generator), torch.randn(4, 6, generator=generator)
    residual = torch.rand(21, generator=generator)
    candidates = torch.randint(21, (4, count), generator=generator)
    kernel = fit_kernel(rows)
    whole = kernel_scores(kernel, queries, rows, 0.3, residual=residual, leverage=True)
    found = candidate_scores(
        kernel,
        queries,
        rows,
        candidates,
        0.3,
        residual=residual,
        leverage=True,
        block_rows=block_rows,
    )
    torch.testing.assert_close(found, whole.gather(1, candidates), rtol=1e-5, atol=1e-7)


def test_screening_by_likeness():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    near = top_scores(cosine_blocks(rows[:3], rows), 5).index
    assert near[:, 0].tolist() == [0, 1, 2]
    kernel = fit_kernel(rows)
    found = candidate_scores(kernel, rows[:3], rows, near, 0.3, readout="signed")
    whole = kernel_scores(kernel, rows[:3], rows, 0.3, readout="signed")
    torch.testing.assert_close(found, whole.gather(1, near), rtol=1e-5, atol=1e-7)
    for bad in (-1, 30):
        with pytest.raises(DataError, match="training rows 0 to 29"):
            candidate_scores(kernel, rows[:1], rows, torch.tensor([[bad]]), 0.3)
    with pytest.raises(DataError, match="5 residuals for 30 training rows"):
        candidate_scores(kernel, rows[:3], rows, near, 0.3, residual=torch.ones(5))

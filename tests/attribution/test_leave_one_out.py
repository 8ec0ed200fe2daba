"""Exact leave-one-out of linear models: golden numbers and refits."""

import json
from pathlib import Path

import pytest
import torch

from diffcal.attribution.leave_one_out import exact_das, ridge_leave_one_out
from diffcal.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def field(case, start):
    return double(next(value for key, value in case.items() if key.split("[")[0] == start))


def test_golden_scalar_output():
    case = GOLDEN["A_loo_scalar"]
    jacobian, query = field(case, "psi_train")[:, None], field(case, "psi_query")[:, None, None]
    found = ridge_leave_one_out(jacobian, field(case, "eps_train")[:, None], case["lambda"])
    torch.testing.assert_close(found.parameters, field(case, "theta_star"), **CLOSE)
    torch.testing.assert_close(found.residual[:, 0], field(case, "residual"), **CLOSE)
    torch.testing.assert_close(found.leverage[:, 0, 0], field(case, "leverage"), **CLOSE)
    torch.testing.assert_close(found.parameters - found.change, field(case, "theta_loo"), **CLOSE)
    torch.testing.assert_close(exact_das(found.change, query), field(case, "das_exact"), **CLOSE)


def test_golden_vector_output_at_two_timesteps():
    case = GOLDEN["B_loo_vector"]
    found = ridge_leave_one_out(
        field(case, "jac_train").flatten(1, 2),
        field(case, "eps_train").flatten(1, 2),
        case["lambda"],
    )
    torch.testing.assert_close(found.parameters, field(case, "theta_star"), **CLOSE)
    torch.testing.assert_close(found.residual, field(case, "residual").flatten(1, 2), **CLOSE)
    torch.testing.assert_close(found.leverage, field(case, "block_leverage"), **CLOSE)
    torch.testing.assert_close(found.parameters - found.change, field(case, "theta_loo"), **CLOSE)
    query = field(case, "jac_query")
    torch.testing.assert_close(exact_das(found.change, query), field(case, "das_exact"), **CLOSE)
    delta = torch.einsum("qtdp,np->qntd", query, found.change)
    torch.testing.assert_close(delta, field(case, "delta_eps_exact"), **CLOSE)


def test_refitting_without_each_example_gives_the_same():
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(9, 3, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    found = ridge_leave_one_out(jacobian, target, 0.2)
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        alone = ridge_leave_one_out(jacobian[rest], target[rest], 0.2).parameters
        torch.testing.assert_close(found.parameters - found.change[i], alone, rtol=1e-9, atol=1e-11)


def test_bad_input_is_one_clear_line():
    with pytest.raises(ConfigError, match="damping must be positive"):
        ridge_leave_one_out(torch.zeros(2, 1, 3), torch.zeros(2, 1), 0.0)
    with pytest.raises(DataError, match=r"Jacobian \[2, 1, 3\] for targets \[3, 1\]"):
        ridge_leave_one_out(torch.zeros(2, 1, 3), torch.zeros(3, 1), 1.0)

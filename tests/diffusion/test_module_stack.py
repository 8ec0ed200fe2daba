"""Stacked networks compute what each of them computes alone."""

import pytest
import torch
from torch import nn

from diffcal.diffusion.module_stack import ModuleStack
from diffcal.errors import ConfigError


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 3)
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x, level, scale=None):
        out = self.b(torch.tanh(self.a(x + level[:, None] * self.shift)))
        return out if scale is None else out * scale[:, None]


def nets(count=4, width=6):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(Net(width))
    return made


def inputs(count=4, rows=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, rows, 3, generator=g), torch.rand(count, rows, generator=g)


def test_outputs_are_those_of_each_network():
    alone, (x, level) = nets(), inputs()
    stack = ModuleStack(alone)
    torch.testing.assert_close(
        stack(x, level), torch.stack([n(a, b) for n, a, b in zip(alone, x, level, strict=True)])
    )
    scaled = stack(x, level, scale=level)
    torch.testing.assert_close(scaled, stack(x, level, scale=None) * level[..., None])
    assert {k: tuple(v.shape) for k, v in stack.stacked().items()} == {
        name: (4, *tensor.shape) for name, tensor in alone[0].state_dict().items()
    }


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_steps_are_those_of_each_network(clip):
    alone, (x, level) = nets(), inputs()
    stack = ModuleStack(alone)
    together = torch.optim.AdamW(stack.parameters(), lr=0.01, weight_decay=0.1)
    apart = [torch.optim.AdamW(n.parameters(), lr=0.01, weight_decay=0.1) for n in alone]
    for _ in range(5):
        stack(x, level).square().flatten(1).mean(dim=1).sum().backward()
        found = stack.clip_gradient_norms_(clip)
        together.step()
        together.zero_grad()
        for i, (network, optimiser) in enumerate(zip(alone, apart, strict=True)):
            network(x[i], level[i]).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), clip)
            torch.testing.assert_close(found[i], norm)
            optimiser.step()
            optimiser.zero_grad()
    for state, network in zip(stack.member_states(), alone, strict=True):
        torch.testing.assert_close(state, dict(network.state_dict()), rtol=1e-4, atol=1e-6)


def test_members_keep_nothing_of_each_other_or_of_the_networks_they_came_from():
    alone, (x, level) = nets(2), inputs(2)
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in alone]
    stack = ModuleStack(alone)
    stack(x, level)[0].sum().backward()
    assert all(
        bool((p.grad[1] == 0).all()) and bool((p.grad[0] != 0).any()) for p in stack.parameters()
    )
    with torch.no_grad():
        for p in stack.parameters():
            p.zero_()
    for network, held in zip(alone, before, strict=True):
        torch.testing.assert_close(dict(network.state_dict()), held, rtol=0, atol=0)


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(ConfigError, match="at least one network"):
        ModuleStack([])
    with pytest.raises(ConfigError, match="same parameters and buffers"):
        ModuleStack([*nets(1), *nets(1, width=7)])
    with pytest.raises(ConfigError, match="batch normalisation"):
        ModuleStack([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    with pytest.raises(ConfigError, match="inputs for 3 members in a stack of 4"):
        ModuleStack(nets())(*inputs(3))

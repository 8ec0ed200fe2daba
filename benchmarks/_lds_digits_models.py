"""The two small noise predictors of ``lds_digits.py``, how they are trained, and their losses."""

import math
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from diffcal.core.rng import item_generator, item_normal
from diffcal.diffusion.module_denoiser import ModuleDenoiser, schedule_noise
from diffcal.diffusion.module_stack import ModuleStack
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.diffusion.schedules import alphas_cumprod
from diffcal.diffusion.training import batch_indices

TIME = 32
BATCH = 64
LEARNING_RATE = 2e-3
DDIM = SamplerConfig(solver="euler", steps=50, schedule="ddpm_linear", sigma_max=1000.0)

State = dict[str, Tensor]


def time_embedding(t: Tensor) -> Tensor:
    """Sines and cosines of timesteps ``[b]``, frequencies from 1 to 1e-4."""
    steps = torch.arange(TIME // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * steps / (TIME // 2))
    phases = t.float()[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class DigitsMlp(nn.Module):
    """53,824 parameters: the first toy of the specification."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.time = nn.Linear(64, 128), nn.Linear(TIME, 128)
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.out = nn.Linear(128, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.image(x.flatten(1)) + self.time(time_embedding(t)))
        h = h + F.silu(self.first(h))
        h = h + F.silu(self.second(h))
        return self.out(h).reshape(x.shape)


class Block(nn.Module):
    """Two convolutions with the timestep added between them, and a skip."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm0, self.conv0 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(TIME, out)
        self.norm1, self.conv1 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x))) + self.time(embedding)[:, :, None, None]
        return self.skip(x) + self.conv1(F.silu(self.norm1(h)))


class DigitsUNet(nn.Module):
    """40,577 parameters: the second toy, with 19,680 of them in ``mid_block``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 16, 3, padding=1)
        self.down_block = Block(16, 16)
        self.downsample = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.mid_block = Block(32, 32)
        self.up_block = Block(48, 16)
        self.norm_out, self.conv_out = nn.GroupNorm(4, 16), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = time_embedding(t)
        kept = self.down_block(self.conv_in(x), embedding)
        h = self.mid_block(self.downsample(kept), embedding)
        h = torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), kept], dim=1)
        return self.conv_out(F.silu(self.norm_out(self.up_block(h, embedding))))


def digits(first: int, count: int) -> Tensor:
    """Images ``[n, 1, 8, 8]`` in [-1, 1], in the specification's permuted order."""
    from numpy.random import RandomState

    images = load_digits().images / 8 - 1
    order = RandomState(0).permutation(len(images))[first : first + count]
    return torch.tensor(images[order], dtype=torch.float32)[:, None]


def labels_of(first: int, count: int) -> Tensor:
    """Classes of :func:`digits`."""
    from numpy.random import RandomState

    labels = load_digits().target
    order = RandomState(0).permutation(len(labels))[first : first + count]
    return torch.tensor(labels[order], dtype=torch.long)


def subset_masks_of_recipe(count: int, n: int = 300, draw: int = 7) -> Tensor:
    """Halves of the training set: the first half of each permutation that RandomState(draw) draws."""
    from numpy.random import RandomState

    generator, masks = RandomState(draw), torch.zeros(count, n, dtype=torch.bool)
    for row in masks:
        row[torch.from_numpy(generator.permutation(n)[: n // 2].copy())] = True
    return masks


def denoiser_of(make: Callable[[], nn.Module], state: State) -> ModuleDenoiser:
    module = make()
    module.load_state_dict(state)
    layer = "second" if isinstance(module, DigitsMlp) else "mid_block"
    return ModuleDenoiser(
        module, schedule_noise(), sample_shape=(1, 8, 8), sigma_data=0.75, feature_modules=(layer,)
    )


def train(
    make: Callable[[], nn.Module],
    data: Sequence[Tensor],
    seeds: Sequence[int],
    steps: int,
    keep: Sequence[int] = (),
) -> list[list[State]]:
    """Weights of one network for each (data, seed), after each step of ``keep`` and the last one.

    AdamW, weight decay 1e-6, one-cycle learning rate with 10 % warm-up, gradients clipped to norm 1,
    unweighted noise prediction. Several networks are trained together, one alone as it is; a network
    meets the same batches, timesteps and noise either way.
    """
    networks = []
    for seed in seeds:
        torch.manual_seed(seed)
        networks.append(make())
    stack = ModuleStack(networks) if len(networks) > 1 else None
    model = stack or networks[0]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=1e-6, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    signal = alphas_cumprod("ddpm_linear").sqrt().float()
    spread = (1 - alphas_cumprod("ddpm_linear")).sqrt().float()
    kept: list[list[State]] = []
    for step in range(steps):
        parts = []
        for images, seed in zip(data, seeds, strict=True):
            g = item_generator(seed, "lds-digits", step)
            x = images[batch_indices(seed, len(images), BATCH, step)]
            parts.append(
                (x, torch.randint(1000, (BATCH,), generator=g), torch.randn(x.shape, generator=g))
            )
        x, t, noise = (torch.stack(column) for column in zip(*parts, strict=True))
        x_t = signal[t][..., None, None, None] * x + spread[t][..., None, None, None] * noise
        if stack is None:
            loss = (model(x_t[0], t[0]) - noise[0]).square().mean()
        else:
            loss = (stack(x_t, t) - noise).square().flatten(1).mean(dim=1).sum()
        loss.backward()
        if stack is None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            stack.clip_gradient_norms_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step + 1 in (*keep, steps):
            states = stack.member_states() if stack else [model.state_dict()]
            kept.append([{k: v.detach().clone() for k, v in state.items()} for state in states])
    return [list(history) for history in zip(*kept, strict=True)]


def generate(denoiser: ModuleDenoiser, count: int) -> tuple[Tensor, Tensor, list[float]]:
    """Images by DDIM with 50 steps; what was predicted at every step, and at which level.

    Predicted images are clipped to [-1, 1] at every step, as the samplers of the papers do: without it
    the MLP's error at the largest noise, multiplied by 157, never heals and its images are no digits.
    """
    noise = torch.stack([item_normal(0, "lds-digits-query", i, (1, 8, 8)) for i in range(count)])
    levels = sampling_sigmas(denoiser, DDIM)
    path: list[Tensor] = []

    def clipped(x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        return denoiser(x, sigma, condition).clamp(-1, 1)

    clipped.sigma_min, clipped.sigma_max = denoiser.sigma_min, denoiser.sigma_max  # type: ignore[attr-defined]
    images = sample(
        clipped, noise, None, DDIM, on_step=lambda i, level, x, seen: path.append(seen.float())
    )
    return images.float().clamp(-1, 1), torch.stack(path), levels[:-1].tolist()


@torch.no_grad()
def losses_of(
    make: Callable[[], nn.Module],
    states: Sequence[State],
    queries: Tensor,
    timesteps: int,
    noises: int,
) -> Tensor:
    """Mean squared error of the predicted noise, ``[models, queries]``, over timesteps and draws.

    The noise of a query depends on (draw, timestep, query): all models meet the same.
    """
    networks = []
    for state in states:
        network = make()
        network.load_state_dict(state)
        networks.append(network)
    model = ModuleStack(networks).eval() if len(networks) > 1 else networks[0].eval()
    abar = alphas_cumprod("ddpm_linear").float()
    total = torch.zeros(len(states), len(queries), dtype=torch.float64)
    for draw in range(noises):
        for t in range(0, 1000, 1000 // timesteps):
            noise = torch.stack(
                [
                    item_normal(draw, f"lds-digits-loss|{t}", i, (1, 8, 8))
                    for i in range(len(queries))
                ]
            )
            x_t = abar[t].sqrt() * queries + (1 - abar[t]).sqrt() * noise
            times = torch.full((len(queries),), t)
            if len(networks) == 1:
                found = model(x_t, times)[None]
            else:
                many = len(networks)
                found = model(x_t.expand(many, *x_t.shape), times.expand(many, -1))
            total += (found - noise).square().flatten(2).mean(dim=2).double()
    return total / (noises * len(range(0, 1000, 1000 // timesteps)))

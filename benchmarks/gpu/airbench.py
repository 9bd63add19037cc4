"""The network of airbench94, how its first layer is initialised, and its Lookahead: written anew after the paper.

Source: K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, arXiv:2404.00498, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2  # pixels, of the sides of the first convolution
EPS = 5e-4  # added to the variances that whitening divides by


class Convolution(nn.Conv2d):
    """A 3 × 3 convolution without bias that begins as the identity on as many channels as it can."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 3, padding="same", bias=False)
        with torch.no_grad():
            nn.init.dirac_(self.weight[:inside])


def norm(width: int) -> nn.BatchNorm2d:
    """BatchNorm with a shift alone: its scale stays 1."""
    made = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    made.weight.requires_grad_(False)
    return made


class Block(nn.Module):
    """Two convolutions, each normalised and through a GELU, with a pooling after the first."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Convolution(inside, outside), norm(outside)
        self.conv2, self.norm2 = Convolution(outside, outside), norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Network(nn.Module):
    """Images (B, 3, 32, 32) to logits (B, 10).

    Args:
        widths: channels of the three blocks.
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        first = 2 * 3 * PATCH**2
        self.whiten = nn.Conv2d(3, first, PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((first, *widths), widths, strict=False)))
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(images)))
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 9


@torch.no_grad()
def whiten(network: Network, images: Tensor) -> None:
    """Make of the first layer what whitens patches of such images: their principal components, and the negatives of these."""
    patches = images.float().unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (B, C, H, W, PATCH, PATCH)
    flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    variances, components = torch.linalg.eigh(flat.T @ flat / len(flat))
    filters = (components / (variances + EPS).sqrt()).T.flip(0).reshape(-1, images.shape[1], PATCH, PATCH)
    network.whiten.weight.copy_(torch.cat([filters, -filters]))


class Lookahead:
    """Slow weights that the network is set back to every few steps, and at the end; ever more of them is kept.

    Source: M. Zhang et al., Lookahead optimizer: k steps forward, 1 step back, arXiv:1907.08610; the rise is airbench's.

    Args:
        network: whose parameters and running means these are.
        steps: of the whole training.
    """

    every = 5

    def __init__(self, network: nn.Module, steps: int) -> None:
        self.live = [t.detach() for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
        self.slow = [tensor.clone() for tensor in self.live]
        self.steps = steps

    @torch.no_grad()
    def pull(self, step: int) -> None:
        """After so many steps, which are a multiple of ``every``: move slow weights by their share, and begin from them."""
        decay = 0.95**self.every * (step / self.steps) ** 3
        torch._foreach_lerp_(self.slow, self.live, 1 - decay)
        torch._foreach_copy_(self.live, self.slow)

    @torch.no_grad()
    def end(self) -> None:
        """Leave the slow weights in the network."""
        torch._foreach_copy_(self.live, self.slow)

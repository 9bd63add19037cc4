"""A GPT-2 of 124 million parameters, in bfloat16 and compiled, on characters of Shakespeare's or on tokens at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.task import SEED, Algorithm, Given, Task, Workload

OF_TOKENS = 50257  # GPT-2's; what a network has beyond is padding to a multiple of 128


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the network is, and how much it trains on."""

    layers: int
    width: int
    heads: int
    length: int  # tokens of a sample
    vocabulary: int
    batch_size: int
    batches: int  # of an epoch
    epochs: int  # of a turn


FULL = Size(12, 768, 12, 1024, 50_304, 32, 34, 2)
SMALL = Size(2, 32, 2, 32, 128, 4, 4, 2)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each of what was normalised, and added to what came."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attend, self.project = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.widen, self.narrow = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.attend(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens (B, T) to logits (B, T, V); the last layer has the weights of the first.

    Source: A. Radford et al., Language models are unsupervised multitask learners, 2019; without dropout.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                onto_stream = name.endswith(("project.weight", "narrow.weight"))  # there are two a layer, which add up
                nn.init.normal_(parameter, std=0.02 / (2 * size.layers) ** 0.5 if onto_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token, the mean over all."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def flops_per_token(size: Size) -> float:
    """FLOPs of forward and backward for a token, as MFU counts them.

    6 for each weight that is multiplied, and 12 · layers · width · length for attention, which is counted as if it were not
    causal (A. Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    multiplied = 12 * size.layers * size.width**2 + size.width * size.vocabulary
    return 6 * multiplied + 12 * size.layers * size.width * size.length


@dataclasses.dataclass
class Data:
    """Tokens (N, T) and those that follow them (N, T), on the device."""

    pair: tuple[Tensor, Tensor]
    size: Size


def load(given: Given) -> Data:
    """Cut the text, or tokens at random, into samples."""
    size = SMALL if given.small else FULL
    samples = size.batch_size * size.batches
    count = samples * size.length + 1
    if given.text is not None:
        tokens = torch.frombuffer(bytearray(given.text.read_bytes()), dtype=torch.uint8).unique(return_inverse=True)[1][:count]
        if len(tokens) < count:
            raise SystemExit(f"{given.text} has {len(tokens):,} characters; {count:,} are needed")
    else:
        known = min(OF_TOKENS, size.vocabulary)
        tokens = torch.randint(known, (count,), generator=torch.Generator().manual_seed(5))
    tokens = tokens.to(given.device)
    return Data((tokens[:-1].view(samples, -1), tokens[1:].view(samples, -1)), size)


def task(data: Data, given: Given, epochs: int, epoch_done: Callable[[float], None]) -> Task:
    """A training that goes on."""
    torch.manual_seed(SEED)
    net = GPT(data.size).to(given.device)
    algorithm = Algorithm("adamw", {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1})
    return Task(net, loss, data.pair, data.size.batch_size, epochs, algorithm, given.device, epoch_done, given.half)


@torch.inference_mode()
def judge(task: Task, data: Data) -> dict[str, float]:
    """The loss on a part of the training set."""
    task.net.eval()
    (x, y), size = data.pair, task.batch_size
    with task.computing():
        losses = [loss(task.net(x[i : i + size // 4]), y[i : i + size // 4]) for i in range(0, 2 * size, size // 4)]
    return {"loss": torch.stack(losses).mean().item()}


def size_of(given: Given) -> Size:
    """The size that is trained."""
    return SMALL if given.small else FULL


def of_step(given: Given) -> dict[str, float]:
    """Tokens and FLOPs of a step."""
    tokens = size_of(given).batch_size * size_of(given).length
    return {"tokens": tokens, "flops": tokens * flops_per_token(size_of(given))}


GPT_124M = Workload(
    "gpt", "GPT", load, task, judge, goes_on=True, epochs=lambda given: size_of(given).epochs, tolerance=0.05, extra=of_step
)

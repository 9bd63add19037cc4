"""By hand: forward, backward, update and the sum of losses as one CUDA graph, which each step plays back.

As torch's notes on CUDA graphs have it: inputs lie in tensors of their own, into which each batch is gathered; a few steps on
another stream come before, so that what is made lazily is there; and gradients are None where the capture begins, so that they
get memory of the graph's own. The steps before are steps of the training. There is no guard against what is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.batches import order
from benchmarks.gpu.task import Task

BEFORE = 3  # steps that are not played back


def prepare(task: Task) -> Callable[[], None]:
    """Lay out the inputs, and build an optimizer whose state can be captured."""
    assert task.precision == "fp32"
    assert not task.padding
    assert task.averaged is task.freeze is task.algorithm.schedule is None
    (x, y), size = task.data, task.batch_size
    static_x, static_y = torch.empty_like(x[:size]), torch.empty_like(y[:size])
    loss_sum = torch.zeros((), device=task.device)
    optimizer = task.algorithm.of(task.net, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(task.net(static_x), static_y)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())

    def fit() -> None:
        graph, side, done = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0
        task.net.train()
        for epoch in range(task.epochs):
            loss_sum.zero_()
            for index in order(task, epoch).split(size):
                torch.index_select(x, 0, index, out=static_x)
                torch.index_select(y, 0, index, out=static_y)
                if done < BEFORE:
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        step()
                    torch.cuda.current_stream().wait_stream(side)
                else:
                    if done == BEFORE:
                        with torch.cuda.graph(graph):  # which does nothing yet
                            step()
                    graph.replay()
                done += 1
            task.epoch_done(loss_sum.item() / task.batches)

    return fit

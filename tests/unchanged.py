"""All that is not to be changed by what only looks: of a loop, of its objective, of the process."""

import copy
import random
import signal
import sys

import numpy as np
import torch


def everything(loop):
    state = loop.save()
    return {
        "objective": copy.deepcopy(dict(loop.objective.state_dict())),
        "gradients": [p.grad if p.grad is None else p.grad.clone() for p in loop.objective.parameters()],
        "modes": [m.training for m in loop.objective.modules()],
        "attributes": [sorted(vars(m)) for m in loop.objective.modules()],
        "hooks": [len(m._forward_hooks) for m in loop.objective.modules()],
        "identities": [id(p) for p in loop.objective.parameters()],
        "optimizers": state["optimizers"],
        "momenta": [copy.deepcopy(o.state_dict()["state"]) for u in loop.state.optimizers.values() for o in u.optimizers],
        "counters": {k: v for k, v in state["counters"].items() if k != "elapsed"},
        "readings": [state["values"], state["history"], state["meter"]],
        "status": [loop.state.status, loop.state.plan, loop.state.half_done],
        "run's generators": state["rng"],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "profiler": sys.getprofile(),
        "modes of torch": torch._C._len_torch_dispatch_stack(),
        "anomaly": [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()],
        "methods": [vars(torch.Tensor).get(name) for name in ("tolist", "numpy", "cpu", "__repr__", "__array__")],
        "signals": [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return (a == b).all()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b

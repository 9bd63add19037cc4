"""Updates within backward: each parameter is updated as soon as its gradient is there, and the gradient freed at once.

So there is never more than a gradient or two at a time, where else those of all parameters are held together (Lv et al. 2023,
arXiv:2306.09782, section 3.1; torch's tutorial "How to save memory by fusing the optimizer step into the backward pass").
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.errors import ConfigurationError, ObjectiveError
from axontrain.optimizer import Optimizer
from axontrain.schedule_free import averaging
from axontrain.update import Update


class UpdateInBackward(Update):
    """An :class:`~axontrain.update.Update` that is through when backward is.

    An update that is not finite is left out parameter by parameter: by the loss, which is known before, and by a parameter's
    own gradient. Those whose gradients were finite and came first are updated by then.
    """

    def __init__(
        self, name: str, spec: Optimizer, parameters: Mapping[str, nn.Parameter], module: nn.Module | None = None
    ) -> None:
        super().__init__(name, spec, parameters, module)
        for optimizer in self.optimizers:
            if averaging(optimizer):
                raise ConfigurationError(
                    f"in_backward=True: {type(optimizer).__name__} counts its steps once for all its parameters, and would "
                    f"count each of them: leave it out, or take another algorithm with average='ema'"
                )
        self._handles: list[Any] = []
        self._places: dict[Tensor, Any] = {}
        self._met: set[Tensor] = set()
        self._bad_loss, self._bad = torch.zeros(()), torch.zeros(())
        self._one_at_a_time = threading.Lock()  # backward has a thread for each device

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_one_at_a_time": None}  # no lock can be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _one_at_a_time=threading.Lock())

    def begin(self, loss: Tensor) -> None:
        """Before the backward pass of a loss: from now on gradients are used as they come.

        Args:
            loss: scalar.
        """
        self.end()
        self.ready()
        self._bad_loss = (~torch.isfinite(loss.detach().reshape(()))).float()
        self._bad = self._bad_loss.clone()
        self._met.clear()
        self._places = {
            p: (guard, group) for guard in self._guards for group in guard.optimizer.param_groups for p in group["params"]
        }
        for p in self.tensors:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(self._arrived))  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """After it, or after an error: gradients that others compute are theirs."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places = [], {}

    def update(self, loss: Tensor, terms: Mapping[str, Any]) -> Tensor:
        """Finish what backward has done, as :meth:`Update.update` does."""
        if not self._met:
            return self._without_gradients(loss)
        return self._finished(loss, terms, self._bad, self._or_vetoed(self._bad))

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        with self._one_at_a_time:
            if parameter in self._met:
                name = next(name for name, p in self.parameters.items() if p is parameter)
                raise ObjectiveError(
                    f"in_backward=True: {name} got a gradient twice in one backward pass, and had been updated by the first. "
                    f"Where torch.utils.checkpoint computes it anew, use_reentrant=False gives it one"
                )
            self._met.add(parameter)
            guard, group = self._places[parameter]
            gradient: Tensor = parameter.grad  # type: ignore[assignment]  # it has just come
            if gradient.is_sparse:
                guard.unfuse()
                gradient = parameter.grad = gradient.coalesce()
            values = gradient._values() if gradient.is_sparse else gradient
            bad = (~torch.isfinite(values).all()).float() if values.is_complex() else self._checked([values])
            bad = torch.maximum(bad, self._bad_loss.to(bad.device))
            # In place: a new tensor would lie in the hole that the last gradient left, and the next would not fit in there.
            self._bad.copy_(torch.maximum(self._bad, bad.to(self._bad.device)))
            if self.spec.clip_value is not None:
                values.clamp_(-self.spec.clip_value, self.spec.clip_value)
            guard.step_alone(parameter, group, self._or_vetoed(bad))
            parameter.grad = None


def bound(name: str, spec: Optimizer, parameters: Mapping[str, nn.Parameter], module: nn.Module) -> Update:
    """An optimizer bound to parameters of a module, to update after backward or within it, as it says."""
    return (UpdateInBackward if spec.in_backward else Update)(name, spec, parameters, module)

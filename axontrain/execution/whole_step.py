"""One compiled function for a whole step: forward, backward, the look for what is not finite, clipping, update.

``loss.backward()`` and ``optimizer.step()`` would each end a graph. What becomes one graph is :func:`torch.func.grad_and_value`
over the objective, and torch's optimizers in their functional form (:mod:`axontrain.execution.algorithms`), written in place.
The learning rate is a tensor, so that another is no other graph; weight decay, momentum and betas are tensors once they change.

Dynamo looks up its code for a call by guards, around which it does much that a step need not do again. Here its guards are
checked, and its code is called, without that: of a small step it is the half.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.execution.algorithms import Form, begin, form
from axontrain.execution.breaks import UntraceableError, in_short, trying
from axontrain.execution.functional import PREFIX, Forward, differentiated
from axontrain.execution.inductor import Backend, ClosedError
from axontrain.execution.precision import Precision
from axontrain.execution.twin import COMPARED
from axontrain.objective import Objective, Step
from axontrain.update import Update

# Guards that hold by themselves: on what torch and this package are made of, on constants of the function, and on the structure
# of its arguments, which is made here.
OURS = (
    "G['__import_torch']", "G['__import_torch_dot_", "G['__import_axontrain']", "G['__import_axontrain_dot_",
    "G['__import_contextlib']", "G['__builtins_dict", "__import__('torch')",
)  # fmt: skip
# What a step does not look at: it is in no transform of torch.func, and saves nothing for a backward pass.
AMBIENT = ("FUNCTORCH_STACK_MATCH", "AUTOGRAD_SAVED_TENSORS_HOOKS")
CONSTANTS, LISTS = ("layout", "rates", "numbers"), ("params", "states", "buffers")


class Layout:
    """What the function is made of: groups of parameters with their algorithms, buffers, and how gradients are clipped."""

    def __init__(self, update: Update, trained: Sequence[str], changing: Sequence[str], varying: Collection[str]) -> None:
        self.varying = varying
        self.buffers = [PREFIX + name for name in changing]
        self.spec, self.clip_value, self.clip_norm = update.spec, update.spec.clip_value, update.spec.clip_norm
        self.forms: list[Form] = []
        self.names: list[list[str]] = []
        self.params: list[list[Tensor]] = []
        self.places: list[tuple[torch.optim.Optimizer, int]] = []  # of the groups, which torch replaces when it loads
        owned = {id(update.parameters[name]): name for name in trained}
        for optimizer in update.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                if params := [p for p in group["params"] if id(p) in owned]:
                    self._take(optimizer, number, params, [owned[id(p)] for p in params])
        self.keys = [(*one.keys, "step") if one.counts else one.keys for one in self.forms]

    def _take(self, optimizer: torch.optim.Optimizer, number: int, params: list[Tensor], names: list[str]) -> None:
        group = optimizer.param_groups[number]
        found = form(optimizer, group, self.varying)
        if isinstance(found, str):
            raise UntraceableError(found)
        begin(found, group, params, optimizer.state)
        self.forms.append(found)
        self.names.append([PREFIX + name for name in names])
        self.params.append(params)
        self.places.append((optimizer, number))


class WholeStep:
    """The training step of an objective with one optimizer, as one compiled function.

    Args:
        objective: what is trained.
        update: its optimizer.
        precision: what it computes in.
        trained: the names of the parameters that get a gradient: of others torch's optimizers leave alone state and decay.
        changing: the names of the buffers that the step changes.
        varying: options of the optimizer that change, of VARYING.
        dynamic: whether sizes are taken for variable.

    Raises:
        UntraceableError: if an optimizer has no functional form.
    """

    def __init__(
        self,
        objective: Objective,
        update: Update,
        precision: Precision,
        trained: Sequence[str],
        changing: Sequence[str],
        *,
        varying: Collection[str] = (),
        dynamic: bool,
    ) -> None:
        self.dynamic, self.left = dynamic, COMPARED
        self.layout = Layout(update, trained, changing, varying)
        self.slots = [_slot(objective, name) for name in changing]
        # In double only where parameters are: Dynamo takes a scalar in double for a number, and reads it in a guard.
        self.rates = [torch.zeros((), dtype=_wide(params[0]), device=params[0].device) for params in self.layout.params]
        self.set: list[Any] = [None for _ in self.rates]  # what those hold
        self.varies = any(one.varying for one in self.layout.forms)
        self.numbers = [
            torch.zeros(len(one.varying) + 1, dtype=_exact(params[0]), device=params[0].device)  # betas are two
            for one, params in zip(self.layout.forms, self.layout.params, strict=True)
        ]
        self.given: list[Any] = [[] for _ in self.numbers]
        self.options = [itemgetter(*one.options) for one in self.layout.forms]
        self.constants = [tuple(one.options.values()) for one in self.layout.forms]
        self.closure = {"module": Forward(objective, precision), "layout": self.layout}
        self.function = _function(**self.closure)  # type: ignore[arg-type]  # each its own kind
        self.backend = Backend(direct=not dynamic)
        options: Any = {"guard_filter_fn": _matters}
        self._call: Callable[..., Any] = torch.compile(
            self.function, fullgraph=True, dynamic=dynamic, backend=self.backend, options=options
        )
        self._check: Callable[[dict[str, Any]], bool] | None = None

    def first(self, batch: Any) -> Step:
        """Compile, by a first batch, and do its step.

        Raises:
            Exception: whatever torch raises that cannot compile it.
        """
        # Else hooks that are put on modules later would never be called: by default Dynamo does not look for them.
        with trying(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            step = self.attempt(batch)
        if not self.backend.graphs:
            raise UntraceableError("torch's compiler is switched off, by TORCHDYNAMO_DISABLE or torch.compiler.set_stance")
        assert step is not None  # there is nothing yet that it could not fit
        self.backend.closed = True
        self._take_hold()
        return step

    def attempt(self, batch: Any) -> Step | None:
        """Do a step, if what was compiled is of such a batch, of the module as it is, and of the optimizer's options of now."""
        layout = self.layout
        if layout.clip_norm != layout.spec.clip_norm or layout.clip_value != layout.spec.clip_value:
            return None
        for index, (optimizer, number) in enumerate(layout.places):
            group = optimizer.param_groups[number]
            if self.options[index](group) != self.constants[index]:
                return None
            rate = group["lr"]
            if isinstance(rate, Tensor) or rate != self.set[index]:  # a tensor may have been filled in place
                self.rates[index].fill_(rate)
                self.set[index] = rate
            if self.varies and not self._take(index, group):
                return None
        try:
            arguments = self._arguments(batch)
        except KeyError:  # state that was restored from before there was any: see begin
            return None
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if self._check is not None and not self._check({**arguments, **self.closure}):
                return None
            loss, flag, (predictions, targets, weight, values, sample_weights) = self._call(**arguments)
        except Exception as error:
            if isinstance(getattr(error, "inner_exception", None), ClosedError):
                return None
            raise
        finally:
            torch._C._set_grad_enabled(enabled)
        return Step(loss, predictions, targets, weight, values, flag, sample_weights)

    def _take(self, index: int, group: dict[str, Any]) -> bool:
        """Take the options that vary, as they are now."""
        numbers = self.layout.forms[index].numbers(group)
        if numbers is not None and numbers != self.given[index]:
            for place, value in zip(self.numbers[index], numbers, strict=False):
                place.fill_(value)  # which does not wait for a device, as a copy from the host's memory would
            self.given[index] = numbers
        return numbers is not None

    def begin(self) -> None:
        """Make the state that the optimizers lack, as after a state was restored from before their first step."""
        layout = self.layout
        for one, params, (optimizer, number) in zip(layout.forms, layout.params, layout.places, strict=True):
            begin(one, optimizer.param_groups[number], params, optimizer.state)

    def why_not(self, batch: Any) -> str:
        """What of it does not fit any more, in torch's words; "" if that is not known."""
        for (optimizer, number), one in zip(self.layout.places, self.layout.forms, strict=True):
            for name, value in one.options.items():
                if (now := optimizer.param_groups[number][name]) != value:
                    return f"the optimizer's {name} was {value}, and is {now}"
        for name in ("clip_norm", "clip_value"):
            if (now := getattr(self.layout.spec, name)) != (value := getattr(self.layout, name)):
                return f"the optimizer's {name} was {value}, and is {now}"
        check: Any = self._check
        try:
            with torch.no_grad():
                told = check.__self__.check_verbose({**self._arguments(batch), **self.closure})
            return "; ".join(in_short(str(part)) for part in told.verbose_code_parts)
        except Exception:  # of another version of torch
            return ""

    def _arguments(self, batch: Any) -> dict[str, Any]:
        """What the function takes, as it is now: state and buffers may have been replaced."""
        layout = self.layout
        states = [
            {key: [optimizer.state[p][key] for p in params] for key in keys}
            for keys, params, (optimizer, _) in zip(layout.keys, layout.params, layout.places, strict=True)
        ]
        buffers = [owner._buffers[name] for owner, name in self.slots]
        return {
            "params": layout.params,
            "states": states,
            "rates": self.rates,
            "numbers": self.numbers,
            "buffers": buffers,
            "batch": batch,
        }

    def _take_hold(self) -> None:
        """Take hold of Dynamo's guards and of its code."""
        try:
            from torch._dynamo.eval_frame import _debug_get_cache_entry_list

            (entry,) = _debug_get_cache_entry_list(self.function.__code__)
            check = entry.guard_manager.root.check
            names = _bare(self.function.__globals__, entry.code.co_names)
            call = types.FunctionType(entry.code, names, closure=self.function.__closure__)
        except Exception:  # of another version of torch, where it has to look by itself
            return
        self._check, self._call = check, call


def _bare(names: dict[str, Any], used: Sequence[str]) -> dict[str, Any]:
    """What Dynamo's code calls, without what keeps Dynamo from tracing it, and without marks for profilers."""
    utils: Any = torch._dynamo.utils
    marks = {"record_pregraph_bytecode_enter": lambda: None, "record_pregraph_bytecode_exit": lambda _: None}
    wrapped = {name: names[name] for name in used if name.startswith("__compiled_fn") and name in names}
    bare = {name: getattr(function, "_torchdynamo_orig_callable", function) for name, function in wrapped.items()}
    return {**names, **bare, "__import_torch_dot__dynamo_dot_utils": types.SimpleNamespace(**{**vars(utils), **marks})}


def _function(module: nn.Module, layout: Layout) -> Any:
    """Make the function to be compiled: of code of its own, since Dynamo keeps what it has compiled by that."""

    def whole_step(params: Any, states: Any, rates: Any, numbers: Any, buffers: Any, batch: Any) -> Any:
        groups = [[p.detach() for p in group] for group in params]
        trained = {
            name: p for names, group in zip(layout.names, groups, strict=True) for name, p in zip(names, group, strict=True)
        }
        copies = dict(zip(layout.buffers, buffers, strict=True))
        by_name, loss, parts, after = differentiated(module, trained, copies, batch)
        gradients, bad = _clipped([[by_name[name] for name in names] for names in layout.names], loss, layout)
        for index, algorithm in enumerate(layout.forms):
            state = states[index]
            live = [*groups[index], *[tensor for key in state for tensor in state[key]]]
            before = [tensor.clone() for tensor in live]
            algorithm.apply(groups[index], gradients[index], state, rates[index], algorithm.named(numbers[index]))
            for tensor, old in zip(live, before, strict=True):
                tensor.copy_(torch.where(bad, old, tensor))
        for name, buffer in copies.items():
            buffer.copy_(torch.where(bad, buffer, after[name]))
        return loss, bad.float(), parts

    whole_step.__code__ = whole_step.__code__.replace(co_name="whole_step")
    return whole_step


def _clipped(gradients: list[list[Tensor]], loss: Tensor, layout: Layout) -> tuple[list[list[Tensor]], Tensor]:
    """Gradients within their bounds, and whether they or the loss were not finite: as :class:`axontrain.update.Update` does."""
    value, most = layout.clip_value, layout.clip_norm
    norm: Tensor | None = None
    if most is not None and value is None:
        norm = _norm(gradients)
        bad = ~torch.isfinite(norm + loss)
    else:
        bad = torch.stack([~torch.isfinite(one).all() for one in (*[g for group in gradients for g in group], loss)]).any()
        if value is not None:
            gradients = [[g.clamp(-value, value) for g in group] for group in gradients]
        norm = None if most is None else _norm(gradients)
    if most is not None and norm is not None:
        factor = (most / (norm + 1e-6)).clamp_max(1.0)
        gradients = [[g * factor.to(g.dtype) for g in group] for group in gradients]
    return gradients, bad


def _norm(gradients: list[list[Tensor]]) -> Tensor:
    wide = _wide(gradients[0][0])
    norms = [torch.linalg.vector_norm(g).to(wide) for group in gradients for g in group]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    return module.get_submodule(owner), last


def _matters(entries: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are checked each step: those on the batch, the module, its parameters, and torch's settings."""
    return [not _holds(entry.name, entry.guard_type) for entry in entries]


def _holds(name: str, guard: str) -> bool:
    """Whether a guard holds in every step; that of a name of this module's holds, and those of others' begin with __import_."""
    root = name.partition("[")[0].partition(".")[0]
    own = name.startswith(OURS) or (root == "G" and not name.startswith("G['__import_"))
    return own or guard in AMBIENT or root in CONSTANTS or (root in LISTS and guard != "TENSOR_MATCH")

import time

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from axontrain import ConfigurationError
from axontrain.naming import DEPTH, clean_names, cleaned, cleanings


class Own(nn.Module):
    """A class of somebody's own, with an attribute that is called as a wrapper's is."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def compiled(module):
    return torch.compile(module, backend="eager")  # not run, so that nothing is compiled


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel], ids=lambda wrap: wrap.__name__)
def test_the_segment_of_a_wrapper_is_left_out(wrap):
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    wrapped = wrap(plain)
    names = clean_names(wrapped)
    assert set(names) == set(wrapped.state_dict())
    assert set(names) != set(plain.state_dict())
    assert set(names.values()) - {"n_averaged"} == set(plain.state_dict())
    for key, name in names.items():
        if name != "n_averaged":
            assert torch.equal(wrapped.state_dict()[key], plain.state_dict()[name])


def test_wrappers_in_wrappers_and_in_the_middle():
    inner = nn.Sequential(nn.DataParallel(compiled(nn.Linear(2, 2))), nn.Linear(2, 2))
    names = clean_names(compiled(nn.DataParallel(inner)))
    assert names["_orig_mod.module.0.module._orig_mod.weight"] == "0.weight"
    assert names["_orig_mod.module.1.bias"] == "1.bias"
    assert sorted(names.values()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_an_attribute_of_ones_own_stays():
    own = Own(nn.Linear(2, 1))
    assert clean_names(own) == {"module.weight": "module.weight", "module.bias": "module.bias"}
    assert clean_names(nn.DataParallel(own))["module.module.weight"] == "module.weight"
    named = nn.ModuleDict({"_orig_mod": nn.Linear(2, 1, bias=False)})
    assert clean_names(named) == {"_orig_mod.weight": "_orig_mod.weight"}
    wrapper = nn.DataParallel(nn.Linear(2, 1, bias=False))
    wrapper.head = Own(nn.Linear(2, 1, bias=False))  # beside what is wrapped
    assert set(clean_names(wrapper).values()) == {"weight", "head.module.weight"}


def test_a_subclass_of_a_wrapper_is_one():
    class Parallel(nn.DataParallel):
        pass

    assert clean_names(Parallel(nn.Linear(2, 1, bias=False))) == {"module.weight": "weight"}


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        assert clean_names(compiled(wrapped)) == {"_orig_mod.module.weight": "weight", "_orig_mod.module.bias": "bias"}
    finally:
        torch.distributed.destroy_process_group()


def test_activation_checkpointing_has_two_names_for_one_tensor():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 1, bias=False)))
    assert list(module.state_dict()) == ["0.weight"]  # its hook says so
    assert clean_names(module) == {"0.weight": "0.weight", "0._checkpoint_wrapped_module.weight": "0.weight"}


def test_tied_parameters_and_extra_state_are_keys_like_others():
    one = WithState(2, 2)
    names = clean_names(compiled(nn.ModuleList([one, one])))
    assert names["_orig_mod.1.weight"] == "1.weight"
    assert names["_orig_mod.0._extra_state"] == "0._extra_state"
    assert len(names) == 6


def test_two_keys_that_would_become_one_are_named():
    wrapper = nn.DataParallel(nn.Linear(2, 1))
    wrapper.register_buffer("bias", torch.zeros(1))
    with pytest.raises(ConfigurationError, match=r"DataParallel: 'bias' and 'module\.bias' would both be called 'bias'"):
        clean_names(wrapper)


def test_nothing_is_imported_for_it(imported):
    assert imported["names"] == ["0.weight", "0.bias"]
    assert imported["for names"] == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_name_of_a_forged_file_takes_no_time(prefix):
    started = time.process_time()
    assert len(list(cleanings([f"{prefix * 40_000}w"] * 2))) <= DEPTH + 2
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a", "b.c"], ["a", "b.c"]),
        (["module.a", "module.b.c"], ["a", "b.c"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
        (["module.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["net._orig_mod.a", "head.b"], ["net.a", "head.b"]),
        (["net._orig_mod.a", "net.a"], ["net._orig_mod.a", "net.a"]),
        (["module", "module.a"], ["module", "module.a"]),
        (["module."], ["module."]),
        (["_orig_mod"], ["_orig_mod"]),
        (["modules.a", "module.b"], ["modules.a", "module.b"]),
    ],
)
def test_names_of_a_file(names, expected):
    assert cleaned(names) == dict(zip(names, expected, strict=True))
    first, *_ = ways = list(cleanings(names))
    assert list(first) == list(first.values()) == names
    assert ways[-1] == cleaned(iter(names))
    assert all(len(set(way.values())) == len(names) for way in ways)

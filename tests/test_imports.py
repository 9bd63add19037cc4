import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys

import torch, safetensors.torch

before = set(sys.modules)
import axontrain
after = set(sys.modules)
print(json.dumps({"new": sorted(after - before), "all": sorted(after), "stdlib": sorted(sys.stdlib_module_names)}))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "module",
    [
        "torchmetrics", "matplotlib", "tqdm.notebook", "tqdm.auto", "ipywidgets", "IPython", "pandas", "polars",
        "narwhals", "pyarrow", "PIL", "datasets", "webdataset", "sklearn", "scipy", "torchvision", "lightning",
        "torch._dynamo", "torch._inductor", "pytest", "hypothesis",
    ],
)  # fmt: skip
def test_importing_axontrain_does_not_import(imported, module):
    assert module not in imported["all"]


def test_what_importing_axontrain_brings_beyond_torch_is_itself(imported):
    top = {name.partition(".")[0] for name in imported["new"]} - set(imported["stdlib"])
    assert top <= {"axontrain", "tqdm"}

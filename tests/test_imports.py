import pytest


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

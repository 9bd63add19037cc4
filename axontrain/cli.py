"""The command: ``axontrain fit digits``, ``axontrain import-weights file.pt``."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axontrain import __version__, data, display, schedules
from axontrain.checkpoint import name_of
from axontrain.checkpoint.importing import import_weights
from axontrain.checkpoint.listing import listed
from axontrain.errors import AxonError, MissingExtraError
from axontrain.loop import Loop
from axontrain.objective import Objective
from axontrain.optimizer import Optimizer


class Digits(Objective):
    """A small convolutional network that reads handwritten digits: 8×8 pixels, ten classes."""

    metrics = ("accuracy",)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 10),
        )

    def predict(self, images: Tensor) -> Tensor:
        """Map (B, 64) pixels in 0..1 to (B, 10) logits."""
        logits: Tensor = self.net(images)
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(logits, labels)


def fit_digits(directory: Path, epochs: int, seed: int, *, resume: bool = False) -> int:
    """Train on the shipped digits into a run directory; print the readings and where things are."""
    train, test = data.digits()
    torch.manual_seed(seed)  # of the first weights; all else follows from the Loop's own seed
    optimizer = Optimizer("adamw", lr=4e-3, weight_decay=0.01, schedule=schedules.one_cycle())
    loop = Loop(Digits(), optimizer, seed=seed, directory=directory)
    result = loop.fit(train, test, epochs=epochs, batch_size=64, resume=resume)
    print(result)
    if not result.ok:
        print(f"to go on: axontrain fit digits --epochs {epochs} --seed {seed} --directory {directory} --resume")
        return 130
    print(f"test accuracy {100 * result.values['val/accuracy']:.2f} % on {len(test)} digits it has not seen")
    print(f"run directory {directory}:")
    print("  history.jsonl          the readings, a line for each epoch")
    print(f"  {name_of(result.state.step)}/        the whole state: loop.restore(this directory)")
    print(f"  (to list and verify the checkpoints: axontrain checkpoints {directory})")
    try:
        display.save_curve(result.history.rows, directory / "curve.png")
        print("  curve.png              the learning curves")
    except MissingExtraError as error:
        print(f"  (no learning curve: {error})")
    return 0


def list_checkpoints(directory: Path) -> int:
    """Print the checkpoints of a run, each verified; the exit status is 0 if all are good."""
    try:
        table, good = listed(directory)
    except (AxonError, OSError) as error:
        print(f"axontrain: {error}", file=sys.stderr)
        return 1
    print(table)
    return 0 if good else 1


def import_file(file: Path, out: Path | None, key: str | None) -> int:
    """Make safetensors of a file of ``torch.save``; the exit status."""
    try:
        import_weights(file, out, key=key)
    except (AxonError, OSError) as error:
        print(f"axontrain: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    >>> main(["--version"])
    Traceback (most recent call last):
        ...
    SystemExit: 0
    """
    parser = argparse.ArgumentParser("axontrain", description="Train PyTorch objectives with one short loop.")
    parser.add_argument("--version", action="version", version=f"axontrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="train a model that the package ships")
    fit.add_argument("what", choices=["digits"], help="digits: a small network on handwritten digits")
    fit.add_argument("--epochs", type=int, default=20)
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--directory", type=Path, help="where to write; a new one under runs/ unless given")
    fit.add_argument(
        "--resume", action="store_true", help="go on with the run in --directory, as if it had not been interrupted"
    )
    checkpoints = commands.add_parser("checkpoints", help="list and verify the checkpoints of a run")
    checkpoints.add_argument("directory", type=Path, metavar="DIR", help="a run directory, or one checkpoint")
    imports = commands.add_parser("import-weights", help="make safetensors of what torch.save wrote (a file that you trust)")
    imports.add_argument("file", type=Path, metavar="FILE", help="a .pt, .pth, .bin or .ckpt")
    imports.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the same name with .safetensors unless given")
    imports.add_argument("--key", help="where in FILE the tensors are, as in ema.model; well-known keys are found without it")
    given = parser.parse_args(arguments)
    try:
        return _run(parser, given)
    except KeyboardInterrupt:  # before or after a fit, which ends at a Ctrl-C by itself
        print("axontrain: interrupted", file=sys.stderr)
        return 130


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if given.command == "import-weights":
        return import_file(given.file, given.out, given.key)
    if given.command == "checkpoints":
        return list_checkpoints(given.directory)
    if given.epochs < 1:
        parser.error("--epochs: 1 or more")
    if given.resume and given.directory is None:
        parser.error("--resume: say by --directory which run is to go on")
    directory = given.directory or Path("runs") / f"{given.what}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        if not given.resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            parser.error(
                f"--directory: {directory} is there already, and not empty: a run has one of its own (--resume goes on with it)"
            )
        directory.mkdir(parents=True, exist_ok=True)  # now, rather than fail after the first epoch
        return fit_digits(directory, given.epochs, given.seed, resume=given.resume)
    except (AxonError, OSError) as error:
        print(f"axontrain: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

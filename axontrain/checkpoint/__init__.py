"""Checkpoints: a state as safetensors and JSON in a directory, committed whole or not at all."""

from axontrain.checkpoint.directory import read, write
from axontrain.checkpoint.runs import name_of

__all__ = ["name_of", "read", "write"]

"""Checkpoints: a state as safetensors and JSON in a directory, committed whole or not at all."""

from axontrain.checkpoint.directory import name_of, read, write

__all__ = ["name_of", "read", "write"]

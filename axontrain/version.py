"""The version, which checkpoints name too."""

VERSION = "0.1.0"

"""What waits for a GPU, refused on any machine."""

from axontrain.execution.reads import HostReads


class NoHostReads(HostReads):
    """Raises on what waits for a GPU: reading a value, and sizes that depend on values."""

    def __init__(self):
        super().__init__(_refuse)


def _refuse(word):
    raise AssertionError(f"{word} waits for the device")

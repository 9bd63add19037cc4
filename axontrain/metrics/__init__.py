"""Metrics: names over torchmetrics, and the accumulators that keep them on the device."""

from axontrain.metrics.meter import Meter
from axontrain.metrics.registry import register, registered, unweighted

__all__ = ["Meter", "register", "registered", "unweighted"]

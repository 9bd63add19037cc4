"""What training costs on a GPU: `python -m benchmarks.gpu` (see there)."""

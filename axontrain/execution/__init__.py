"""What stands around a training step: the runners of a step, modes, signals, and the plan of a run."""

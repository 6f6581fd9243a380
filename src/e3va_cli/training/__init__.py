"""Training and evaluation with Lightning: the task, its schedule, checkpoints, resources and results."""

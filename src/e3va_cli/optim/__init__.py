"""The optimizer, learning rate schedules, and the length of a run."""

"""What moves the weights: the optimizer, the learning rate over a run, and how long a run is."""

"""Memory of a training step: tracked op by op, estimated without running it, or measured."""

"""The typed configuration of each command, composed with Hydra."""

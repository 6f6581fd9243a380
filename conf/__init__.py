"""The Hydra configuration: every number of the program lives in this folder."""

"""Training and evaluation with Lightning: LightningModule, callbacks, checkpoints and resuming."""

"""Dataset formats: one file each, subclasses of `base.DatasetFormat`."""

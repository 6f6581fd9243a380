"""Pre-trained weights that come with the package; see the README.md beside each file."""

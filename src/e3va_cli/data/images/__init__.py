"""Reading of image files: formats, bit depth and orientation."""

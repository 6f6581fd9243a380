"""Drawing of images with boxes and masks, curves and plots."""

"""Drawing of predictions and annotations on images, and plots."""

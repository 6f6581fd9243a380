"""E3VA: fine-tune large frozen vision backbones for detection and segmentation with little memory."""

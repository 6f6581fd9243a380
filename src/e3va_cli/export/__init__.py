"""Export of trained models: adapter folders, ONNX and torch.export."""

"""Trained models as files for other programs: safetensors, ONNX, torch.export, timm."""

"""File formats of tensors: safetensors and PyTorch pickles."""

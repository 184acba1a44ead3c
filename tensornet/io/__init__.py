"""Read safetensors files strictly; write files and folders completely or not at all."""

"""Files: safetensors read strictly, and written completely or not at all."""

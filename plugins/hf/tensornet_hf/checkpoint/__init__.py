"""Model folders: what transformers stores and loads, with compressed layers in it."""

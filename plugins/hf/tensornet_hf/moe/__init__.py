"""Upcycling: dense feed-forward networks of Hugging Face models become mixtures of experts."""

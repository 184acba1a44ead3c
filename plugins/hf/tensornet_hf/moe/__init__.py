"""Upcycling: convert dense feed-forward networks of Hugging Face models to mixtures of experts."""

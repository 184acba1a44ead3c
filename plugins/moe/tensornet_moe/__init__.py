"""Mixtures of experts that share cores: experts, routers, losses, gradient mask."""

__all__: list[str] = []

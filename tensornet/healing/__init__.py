"""Healing: training or refitting the cores of a compressed model against its dense teacher."""

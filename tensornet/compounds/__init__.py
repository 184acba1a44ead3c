"""Replacements for stock modules with several matrices: attention, convolutions and recurrent layers."""

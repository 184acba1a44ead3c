"""A matrix of one expert among many: the layer that a stack of experts is made of when it is taken apart."""

from tensornet.nn.compound import PartKind, PartMatrix
from tensornet.nn.stock_layers import register_layer_kind


class ExpertMatrix(PartMatrix):
    """One matrix of one expert; biases of experts stay stacked."""


class _ExpertKind(PartKind):
    name = "expert"
    layer = ExpertMatrix


register_layer_kind(_ExpertKind())

"""Layer for the matrix of one expert, when a stack of experts is split."""

from tensornet.nn.compound import PartKind, PartMatrix
from tensornet.nn.stock_layers import register_layer_kind


class ExpertMatrix(PartMatrix):
    """Matrix of one expert; the biases of experts stay stacked."""


class _ExpertKind(PartKind):
    name = "expert"
    layer = ExpertMatrix


register_layer_kind(_ExpertKind())

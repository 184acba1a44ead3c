"""Importance matrices of files and inputs of layers are converted to each other, without the extra `gguf`."""

from __future__ import annotations

import numpy as np
import torch

from tensornet_hf.exporters.gguf import Place
from tensornet_hf.imatrix import Importance
from tensornet_hf.recipes import file_importance, layer_inputs


def test_inputs_of_a_layer_whose_columns_the_file_permutes() -> None:
    columns = np.array([2, 0, 3, 1])  # column 0 of the tensor is column 2 of the layer
    places, shapes = {"blk.0.x.weight": Place({"x": 3}, np.arange(3), columns)}, {"blk.0.x.weight": (3, 4)}
    in_file, counts = torch.tensor([[30.0, 10.0, 40.0, 20.0]]), torch.tensor([5])
    of_layer = torch.tensor([10.0, 20.0, 30.0, 40.0])
    entries = {"blk.0.x.weight": Importance(in_file, counts)}
    found = layer_inputs(entries, places, shapes, "The importance matrix")
    assert found.keys() == {"x"}
    assert torch.equal(found["x"], of_layer)
    made = file_importance({"x": (of_layer, 5)}, places, shapes)["blk.0.x.weight"]
    assert torch.equal(made.squares, in_file)
    assert torch.equal(made.counts, counts)

"""One set of words says what experts, mixtures and specialists share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.sharing import SHARES, shared_cores

CHAIN = tn.topologies.mpo(out_dims=(2, 4, 2), in_dims=(2, 4, 2))
WORDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "in": ("2",),
    "out": ("0",),
    "ends": ("0", "2"),
    "center": ("1",),
    "base": ("0", "1", "2"),
}


def test_each_word_names_the_cores_of_a_chain() -> None:
    assert WORDS.keys() == set(SHARES)
    for word, cores in WORDS.items():
        assert shared_cores(CHAIN, word) == tm.SharedCoreExperts(CHAIN, 3, share=word).shared == cores


def test_shared_in_projects_the_inputs_and_shared_out_spans_the_outputs() -> None:
    topology = tn.topologies.low_rank(out_features=6, in_features=5, rank=2)
    matrices = {
        word: tm.SharedCoreExperts(topology, 4, share=word).expert_matrices().detach()
        for word in ("in", "out", "none")
    }
    ranks = {
        word: (torch.linalg.matrix_rank(torch.cat(list(x))), torch.linalg.matrix_rank(torch.cat(list(x), 1)))
        for word, x in matrices.items()
    }
    assert ranks == {"in": (2, 6), "out": (5, 2), "none": (5, 6)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda word: tm.SharedCoreExperts(CHAIN, 2, share=word), SHARES),
        (lambda word: tm.mixture(d_model=16, share=word), ("none", "center", "base")),
        (
            lambda word: tm.specialists(torch.nn.Sequential(torch.nn.Linear(16, 16)), share=word, rank=2),
            ("none", "in", "out", "ends", "center"),
        ),
    ],
    ids=["bank", "mixture", "specialists"],
)
def test_each_function_takes_its_words_and_lists_them_for_all_others(call: Any, words: Any) -> None:
    for word in words:
        call(word)
    for word in {*SHARES, "all", "middle"} - set(words):
        with pytest.raises(ValueError, match=f"choose one of {', '.join(words)}"):
            call(word)

"""Table of the rows of moe_from_scratch.py."""

from __future__ import annotations

from typing import Any

from scratch_rows import Row


def fine(name: str, kind: str, experts: int = 30, **options: Any) -> Row:
    """Build a row with a half-size always-on expert, and many quarter-size experts, two of them active."""
    of_the_row = ("private_rate", "shared_rate", "combine", "top_k", "hidden", "shared_hidden")
    given = {key: options.pop(key) for key in of_the_row if key in options}
    usual = {"top_k": 2, "hidden": 1 / 4, "shared_hidden": 1 / 2}
    return Row(name, kind, experts=experts, options=options, **{**usual, **given})


#: Steps over which a fading mask falls to zero, half a million tokens in batches of 2,048.
FADE = 245


def masks() -> list[Row]:
    """MPOE with the gradient mask and with rates of the center, under AdamW and under SGD."""
    kinds: dict[str, dict[str, Any]] = {
        "mask 0.5": {"mask": 0.5},
        "mask 0.9": {"mask": 0.9},
        "mask 0.5, compensated": {"mask": 0.5, "mask_compensate": True},
        "mask 0.9, compensated": {"mask": 0.9, "mask_compensate": True},
        "mask 0.9, fading": {"mask": 0.9, "mask_fade": FADE},
        "center frozen": {"mask": 1.0},
    }
    found = [fine(f"fine, MPOE, {name}", "mpoe", **options) for name, options in kinds.items()]
    kinds = {f", {name}": options for name, options in kinds.items()}
    kinds |= {f", center rate {x:g}": {"shared_rate": x} for x in (0.1, 0.3, 3.0)}
    for name, options in {"": {}, **kinds}.items():
        found.append(fine(f"SGD, fine, MPOE{name}", "mpoe", **options, optimizer="sgd"))
    return [*found, Row("SGD, dense", "dense", options={"optimizer": "sgd"})]


ROWS = {
    row.name: row
    for row in (
        Row("dense", "dense"),
        Row("dense x2", "dense", hidden=2.0),
        Row("dense x8", "dense", hidden=8.0),
        # One expert a token.
        Row("Switch", "switch", experts=8),
        Row("Switch, prob", "switch", experts=8, combine="prob"),
        Row("MPOE", "mpoe", experts=8),
        Row("MPOE, random start", "mpoe", experts=8, options={"start": "random"}),
        Row("MPOE, private rate 0.1", "mpoe", experts=8, private_rate=0.1),
        Row("MPOE, bonds 8", "mpoe", experts=8, options={"max_bond": 8}),
        Row("MPOE, ends 8x8", "mpoe", experts=8, options={"ends": (8, 8)}),
        Row("MPOE and delta 4", "mpoe", experts=8, options={"delta": 4}),
        Row("bypass", "mpoe", experts=8, options={"shared": "all", "max_bond": 12, "delta": 4}),
        Row("base and deltas", "delta", experts=8, options={"rank": 4}),
        Row("bases", "bases", experts=8, options={"bases": 2, "rank": 32}),
        Row("block tensor trains", "block_tt", experts=8, options={"max_bond": 1}),
        Row("tied over two layers", "tied", experts=8),
        # Two small experts a token, and one that computes every token.
        Row("fine-grained", "switch", experts=23, top_k=2, hidden=1 / 3, shared_hidden=1 / 3),
        fine("fine, E = 30", "switch"),
        fine("fine, E = 5", "switch", 5),
        fine("fine, MPOE", "mpoe"),
        fine("fine, MPOE, random start", "mpoe", start="random"),
        fine("fine, MPOE, noise 0.5", "mpoe", noise=0.5),
        fine("fine, MPOE, one-sided", "mpoe", one_sided=True, start="random"),
        fine("fine, MPOE, private rate 0.3", "mpoe", private_rate=0.3),
        fine("fine, MPOE, private rate 3", "mpoe", private_rate=3.0),
        fine("fine, MPOE, center rate 0.3", "mpoe", shared_rate=0.3),
        fine("fine, MPOE, center rate 0.1", "mpoe", shared_rate=0.1),
        # Capacity against training: nothing shared, wider private parts, the size of steps.
        fine("fine, MPOE, every core private", "mpoe", shared="none"),
        fine("fine, MPOE, every core private, random start", "mpoe", shared="none", start="random"),
        fine("fine, MPOE, ends 8x8", "mpoe", ends=(8, 8)),
        fine("fine, MPOE, ends 8x8, bonds 16", "mpoe", ends=(8, 8), max_bond=16),
        fine("fine, MPOE, ends 8x8, bonds 32", "mpoe", ends=(8, 8), max_bond=32),
        fine("fine, E = 12", "switch", 12),
        fine("fine, MPOE, center rate 3", "mpoe", shared_rate=3.0),
        fine("fine, MPOE, scaled gradients", "mpoe", precondition=0.01),
        *masks(),
        fine("fine, MPOE, bonds 8", "mpoe", max_bond=8),
        fine("fine, MPOE and delta 8", "mpoe", delta=8),
        fine("fine, MPOE and delta 4", "mpoe", delta=4),
        fine("fine, MPOE and delta 16", "mpoe", delta=16),
        fine("fine, bypass", "mpoe", shared="all", max_bond=12, delta=4),
        fine("fine, base and deltas", "delta", rank=4),
        fine("fine, base and deltas 8", "delta", rank=8),
        fine("fine, base and deltas, spread", "delta", rank=4, spread=1.0),
        fine("fine, bases", "bases", bases=4, rank=8),
        fine("fine, block tensor trains", "block_tt", max_bond=1),
        fine("fine, block tensor trains, E = 22", "block_tt", 22, max_bond=1, private_rate=3.0),
        fine("fine, block tensor trains, shared input core", "block_tt", 40, max_bond=1, shared=("1",)),
        fine("fine, scaled", "scaled", bases=1, private_rate=4.0),
        fine("fine, scaled, E = 100", "scaled", 100, bases=1, private_rate=4.0),
        fine("fine, 3 scaled bases", "scaled", 27, bases=3, private_rate=4.0),
        fine("fine, shared down", "split", 10, shared="down"),
        fine("fine, shared up", "split", 10, shared="up"),
        fine("fine, E = 5, prob", "switch", 5, combine="prob"),
        fine("fine, tied over two layers", "tied"),
        fine("fine, tied, E = 12", "tied", 12),
        # More experts for a token, so that it passes as many parameters as in dense x2.
        fine("fine, tied, E = 12, sigmoid", "tied", 12, combine="sigmoid"),
        fine("fine, tied, E = 12, top 6", "tied", 12, top_k=6),
        fine("fine, tied, E = 12, top 6, sigmoid", "tied", 12, top_k=6, combine="sigmoid"),
        fine("fine, tied, 6 of 12, sigmoid", "tied", 12, top_k=6, shared_hidden=7 / 16, combine="sigmoid"),
        fine("fine, tied, 8 of 15, sigmoid", "tied", 15, top_k=8, shared_hidden=0.0, combine="sigmoid"),
        fine("fine, 6 of 6, sigmoid", "switch", 6, top_k=6, combine="sigmoid"),
        fine("fine, MPOE, top 6, sigmoid", "mpoe", top_k=6, combine="sigmoid"),
        fine("fine, E = 5, sigmoid", "switch", 5, combine="sigmoid"),
        fine("fine, MPOE, sigmoid", "mpoe", combine="sigmoid"),
        # For four layers, with as many parameters and as much arithmetic as dense x2 in two.
        Row("dense x3/4", "dense", hidden=3 / 4),
        fine(
            "one pool, E = 15, top 4, sigmoid",
            "tied",
            15,
            top_k=4,
            hidden=1 / 8,
            shared_hidden=1 / 4,
            combine="sigmoid",
            span=4,
        ),
        Row("low ranks in one network", "paths", experts=22, top_k=2, hidden=15 / 16, options={"rank": 2}),
        # Still smaller experts, and one larger expert whose base no second one repeats.
        Row("finer, E = 23", "switch", experts=23, top_k=8, hidden=1 / 16, shared_hidden=1 / 2),
        Row(
            "half, base and deltas",
            "delta",
            experts=19,
            hidden=1 / 2,
            shared_hidden=1 / 2,
            options={"rank": 4},
            combine="prob",
        ),
    )
}

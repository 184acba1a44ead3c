"""Sums of local terms as an MPO with the smallest bonds: the finite-state machine of a Hamiltonian."""

from collections.abc import Mapping, Sequence
from numbers import Number
from operator import index

import numpy as np
import torch
from torch import Tensor

from tensornet.errors import ShapeError

#: A term: a coefficient and the operators that act on its sites, matrices or names of `NAMED`.
Term = tuple[complex, Mapping[int, "str | Tensor | np.ndarray"]]

#: Operators on a qubit with the basis |0>, |1>. `+` is |1><0|, it creates a particle; `n` counts particles.
NAMED: dict[str, list[list[complex]]] = {
    "I": [[1, 0], [0, 1]],
    "X": [[0, 1], [1, 0]],
    "Y": [[0, -1j], [1j, 0]],
    "Z": [[1, 0], [0, -1]],
    "+": [[0, 0], [1, 0]],
    "-": [[0, 1], [0, 0]],
    "n": [[0, 0], [0, 1]],
}

#: The operators of the sites that are still to come, as pairs of a site and a number of an operator.
Rest = tuple[tuple[int, int], ...]
#: A state of the machine, and the operator of this site.
Row = tuple[int, int]


def cores_of_terms(
    terms: Sequence[Term],
    dims: Sequence[int],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> list[Tensor]:
    """Build the cores of `sum_t c_t prod_k O_{t,k}`; sites without an operator get the identity.

    At each bond, a term is an edge between its operators to the left and its operators to the right. The
    bonds of the machine are a smallest set of left and right parts that touches every edge (König's theorem),
    so no bond can be smaller for coefficients in general position. `MPO.round` finds relations between
    coefficients, for example in exponentially decaying interactions.

    Raises:
        ShapeError: a term has another form, a site that does not exist, or an operator of another size.

    Reference:
        Ren, Li, Jiang and Shuai 2020, "A general automatic method for optimal construction of matrix product
        operators using bipartite graph theory".
    """
    matrices = [torch.eye(dim, dtype=torch.complex128) for dim in sorted(set(dims))]
    identities = {dim: number for number, dim in enumerate(sorted(set(dims)))}
    numbers = {(dim, _bytes(matrices[number])): number for dim, number in identities.items()}
    # `edges` maps (state of the machine, rest of the term) to a coefficient.
    edges: dict[tuple[int, Rest], complex] = {}
    for term in terms:
        coefficient, rest = _parsed(term, dims, matrices, numbers, identities)
        edges[0, rest] = edges.get((0, rest), 0) + coefficient
    edges = {edge: value for edge, value in edges.items() if value != 0}
    complex_needed = any(value.imag != 0 for value in edges.values()) or any(
        bool(matrices[number].imag.any()) for _, rest in edges for _, number in rest
    )
    kind = torch.get_default_dtype() if dtype is None else dtype
    if complex_needed and not kind.is_complex:
        if dtype is not None:
            raise ShapeError(
                f"The terms have complex coefficients or operators, but dtype={dtype} is real; use "
                f"{kind.to_complex()}, or write XX + YY as 2 (+- and -+), which is real."
            )
        kind = kind.to_complex()

    cores, states = [], 1
    for site, dim in enumerate(dims):
        # Each edge now connects a row, a state with the operator of this site, and a column, the rest.
        graph: dict[Row, dict[Rest, complex]] = {}
        for (state, rest), value in edges.items():
            here = rest and rest[0][0] == site
            row = (state, rest[0][1] if here else identities[dim])
            column = rest[1:] if here else rest
            graph.setdefault(row, {})[column] = value
        rows, columns = _smallest_cover(graph)
        core = torch.zeros(states, dim, dim, max(len(rows) + len(columns), 1), dtype=torch.complex128)
        edges = {}
        for new, row in enumerate(rows):
            core[row[0], :, :, new] += matrices[row[1]]
            edges.update({(new, column): value for column, value in graph[row].items()})
        covered = set(rows)
        for new, column in enumerate(columns, start=len(rows)):
            for row, ends in graph.items():
                if row not in covered and column in ends:
                    core[row[0], :, :, new] += ends[column] * matrices[row[1]]
            edges[new, column] = 1
        states = core.shape[3]
        cores.append(core)
    # A row that covers the last bond carries its coefficient on its only edge.
    if edges:
        cores[-1] = cores[-1] * torch.tensor([edges[state, ()] for state in range(states)]).to(cores[-1])
    return [(core if kind.is_complex else core.real).to(device=device, dtype=kind) for core in cores]


def _parsed(
    term: Term,
    dims: Sequence[int],
    matrices: list[Tensor],
    numbers: dict[tuple[int, bytes], int],
    identities: Mapping[int, int],
) -> tuple[complex, Rest]:
    """Check a term and number its operators; equal matrices get equal numbers."""
    if not (isinstance(term, Sequence) and len(term) == 2 and isinstance(term[1], Mapping)):
        raise ShapeError(
            f"A term is a pair (coefficient, {{site: operator}}), for example (-1.0, {{0: 'Z', 1: 'Z'}}), "
            f"got {term!r}."
        )
    if not isinstance(term[0], Number | Tensor | np.generic):
        raise ShapeError(f"The coefficient of a term must be a number, got {term[0]!r}.")
    rest = []
    for place, operator in term[1].items():
        try:
            site = index(place)
        except TypeError:
            site = -1
        if not 0 <= site < len(dims):
            raise ShapeError(f"Site {place!r} of a term does not exist; the sites are 0 to {len(dims) - 1}.")
        if isinstance(operator, str):
            if operator not in NAMED:
                raise ShapeError(f"Unknown operator {operator!r}; use a matrix or one of {list(NAMED)}.")
            operator = torch.tensor(NAMED[operator], dtype=torch.complex128)
        matrix = torch.as_tensor(operator).detach().to(device="cpu", dtype=torch.complex128)
        if matrix.shape != (dims[site], dims[site]):
            raise ShapeError(
                f"The operator at site {site} has shape {tuple(matrix.shape)}, but the site has dimension "
                f"{dims[site]}."
            )
        key = (dims[site], _bytes(matrix))
        if key not in numbers:
            numbers[key] = len(matrices)
            matrices.append(matrix)
        if numbers[key] != identities[dims[site]]:
            rest.append((site, numbers[key]))
    return complex(term[0]), tuple(sorted(rest))


def _bytes(matrix: Tensor) -> bytes:
    return (matrix + 0).numpy().tobytes()  # `+ 0` turns -0 into 0


def _smallest_cover(
    graph: Mapping[Row, Mapping[Rest, complex]],
) -> tuple[list[Row], list[Rest]]:
    """Find a smallest set of rows and columns that touches every edge of a bipartite graph.

    A largest matching is found by augmenting paths. By König's theorem, the cover consists of the rows that
    cannot be reached from an unmatched row by alternating paths, and of the columns that can.
    """
    partner: dict[Rest, Row] = {}

    def search(
        start: tuple[int, int],
    ) -> tuple[set[Row], dict[Rest, Row], Rest | None]:
        """Walk from a row along alternating paths until a free column is found."""
        seen, came_from, queue = {start}, {}, [start]
        for row in queue:
            for column in graph[row]:
                if column in came_from:
                    continue
                came_from[column] = row
                if column not in partner:
                    return seen, came_from, column
                if partner[column] not in seen:
                    seen.add(partner[column])
                    queue.append(partner[column])
        return seen, came_from, None

    unmatched = []
    for row in graph:
        _, came_from, column = search(row)
        if column is None:
            unmatched.append(row)
            continue
        previous = {row_: column_ for column_, row_ in partner.items()}
        while column is not None:  # flip the path back to `row`
            before = came_from[column]
            partner[column] = before
            column = previous.get(before) if before != row else None
    reached_rows: set[Row] = set()
    reached_columns: dict[Rest, None] = {}
    for row in unmatched:
        seen, came_from, _ = search(row)
        reached_rows |= seen
        reached_columns.update(dict.fromkeys(came_from))
    return [row for row in graph if row not in reached_rows], list(reached_columns)

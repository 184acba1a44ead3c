"""How fast are operators and states here, in torchTT, quimb, TensorKrowch and tntorch?

    python benchmarks/chains.py [--toy] [--repeats 7]

All installed packages do the same with the same cores, in turn, in one process, on one thread: build a state
from 2^20 values and a Heisenberg operator from its terms, multiply and round to the bond of a factor, compute
inner products, energies, and gradients of energies. A package is missing from a row if it has no function for
it. Energies are divided by the norm only by tensornet. TensorKrowch removes and makes its intermediate nodes
in each call. Writes the record `chains.json`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet as tn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, clock_for, paired_medians, record, with_threads

Calls = dict[str, Callable[[], Any]]
INSTALLED = {name for name in ("torchtt", "quimb", "tensorkrowch", "tntorch") if find_spec(name)}


def heisenberg(sites: int) -> list[Any]:
    bonds = range(sites - 1)
    flips = [(0.5, {k: a, k + 1: b}) for k in bonds for a, b in ("+-", "-+")]
    return flips + [(0.25, {k: "Z", k + 1: "Z"}) for k in bonds]


def three(state: tn.MPO) -> list[Tensor]:
    """Return cores `(left, out, right)`."""
    return [core[:, :, 0].clone() for core in state.cores]


def to_torchtt(chain: tn.MPO) -> Any:
    import torchtt

    return torchtt.TT(three(chain) if set(chain.in_dims) == {1} else [core.clone() for core in chain.cores])


def to_quimb(chain: tn.MPO) -> Any:
    network = chain.to_quimb()
    network.apply_to_arrays(torch.as_tensor)
    return network


def to_tensorkrowch(chain: tn.MPO) -> Any:
    import tensorkrowch

    if set(chain.in_dims) == {1}:
        cores = three(chain)
        cores[0], cores[-1] = cores[0][0], cores[-1][..., 0]
        return tensorkrowch.models.MPS(tensors=cores, out_features=list(range(len(cores))))
    cores = [core.permute(0, 2, 3, 1).clone() for core in chain.cores]
    cores[0], cores[-1] = cores[0][0], cores[-1][:, :, 0]
    return tensorkrowch.models.MPO(tensors=cores)


def constructions(sites: int, dtype: torch.dtype) -> dict[str, Calls]:
    x = torch.linspace(0, 1, 2 ** min(sites, 20), dtype=dtype)
    values, terms = torch.sin(20 * x) / (1 + x), heisenberg(sites)
    dims, digits = [2] * sites, [2] * min(sites, 20)
    states: Calls = {"tensornet": lambda: tn.MPO.from_vector(values, rel_error=1e-5)}
    operators: Calls = {"tensornet": lambda: tn.MPO.from_terms(terms, dims, dtype=dtype)}
    if "torchtt" in INSTALLED:
        import torchtt

        states["torchTT"] = lambda: torchtt.TT(values.reshape(digits), eps=1e-5)
    if "tntorch" in INSTALLED:
        import tntorch

        states["tntorch"] = lambda: tntorch.Tensor(values.reshape(digits), ranks_tt=8)
    if "quimb" in INSTALLED:
        import quimb.tensor as qtn

        def build() -> Any:
            spins = qtn.SpinHam1D(S=1 / 2)
            spins += 0.5, "+", "-"
            spins += 0.5, "-", "+"
            spins += 1.0, "Z", "Z"
            return spins.build_mpo(sites)

        array = values.numpy()
        states["quimb"] = lambda: qtn.MatrixProductState.from_dense(array, dims=digits, cutoff=1e-5)
        operators["quimb"] = build
    found = {"operator from terms": operators}
    return found if sites > 20 else {f"state of 2^{len(digits)} values": states, **found}


def products(sites: int, dtype: torch.dtype, bond: int, generator: torch.Generator) -> dict[str, Calls]:
    options: dict[str, Any] = {"generator": generator, "dtype": dtype}
    operator = tn.MPO.random([2] * sites, max_bond=max(bond // 4, 2), **options)
    state = tn.MPO.random([2] * sites, 1, max_bond=bond, **options)
    found = {}
    for name, right in (("operator and state, rounded", state), ("two operators, rounded", operator)):
        cap = max(right.bond_dims)
        calls: Calls = {"tensornet": lambda right=right, cap=cap: operator.apply(right, max_bond=cap)}
        if "torchtt" in INSTALLED:
            a, b = to_torchtt(operator), to_torchtt(right)
            calls["torchTT"] = lambda a=a, b=b, cap=cap: (a @ b).round(1e-6, cap)
        if "quimb" in INSTALLED:
            c, d, limits = to_quimb(operator), to_quimb(right), {"max_bond": cap, "cutoff": 1e-6}
            calls["quimb"] = lambda c=c, d=d, limits=limits: c.apply(d, compress=True, **limits)
        found[name] = calls
    return found


def energies(sites: int, dtype: torch.dtype, bond: int, generator: torch.Generator) -> dict[str, Calls]:
    state = tn.MPO.random([2] * sites, 1, max_bond=bond, generator=generator, dtype=dtype)
    operator = tn.MPO.from_terms(heisenberg(sites), [2] * sites, dtype=dtype)

    def with_gradient(cores: Sequence[Tensor], energy: Callable[[list[Tensor]], Tensor]) -> None:
        live = [core.detach().requires_grad_() for core in cores]
        torch.autograd.grad(energy(live), live)

    inner: Calls = {"tensornet": lambda: state.inner(state)}
    energy: Calls = {"tensornet": lambda: state.expectation(operator)}
    gradient: Calls = {
        "tensornet": lambda: with_gradient(state.cores, lambda live: tn.MPO(live).expectation(operator))
    }
    if "torchtt" in INSTALLED:
        import torchtt

        x, a = to_torchtt(state), to_torchtt(operator)
        inner["torchTT"] = lambda: torchtt.dot(x, x)
        energy["torchTT"] = lambda: torchtt.bilinear_form(x, a, x)

        def of_cores(live: list[Tensor]) -> Tensor:
            y = torchtt.TT(live)
            return torchtt.bilinear_form(y, a, y)

        gradient["torchTT"] = lambda: with_gradient(x.cores, of_cores)
    if "quimb" in INSTALLED:
        import quimb.tensor as qtn

        psi, h = to_quimb(state), to_quimb(operator)
        inner["quimb"] = lambda: psi.H @ psi
        energy["quimb"] = lambda: qtn.expec_TN_1D(psi.H, h, psi)

        def of_arrays(live: list[Tensor]) -> Tensor:
            ket = psi.copy()
            for site, core in enumerate(live):
                ket[site].modify(data=core)
            return qtn.expec_TN_1D(ket.H, h, ket)

        gradient["quimb"] = lambda: with_gradient([psi[k].data for k in range(sites)], of_arrays)
    if "tntorch" in INSTALLED:
        import tntorch

        t = tntorch.Tensor(three(state))
        inner["tntorch"] = lambda: tntorch.dot(t, t)
    if "tensorkrowch" in INSTALLED:
        alone, mps, mpo = to_tensorkrowch(state), to_tensorkrowch(state), to_tensorkrowch(operator)
        inner["TensorKrowch"] = lambda: alone.norm()

        def expectation() -> Tensor:
            mps.reset()  # otherwise the nodes are still connected to those of the last contraction
            return mps.contract(marginalize_output=True, mpo=mpo).tensor

        energy["TensorKrowch"] = lambda: expectation().detach()
        gradient["TensorKrowch"] = lambda: expectation().backward()
    return {"inner product": inner, "energy": energy, "energy and gradient": gradient}


def measure(sites: int, dtype: torch.dtype, bond: int, repeats: int) -> list[dict[str, Any]]:
    """Measure the rows of one size and dtype."""
    generator = torch.Generator().manual_seed(0)
    tasks = {
        **constructions(sites, dtype),
        **products(sites, dtype, bond, generator),
        **energies(sites, dtype, bond, generator),
    }
    rows = []
    for task, calls in tasks.items():
        times = paired_medians(calls, repeats, clock=clock_for(1))
        rows.append(
            {
                "task": task,
                "sites": sites,
                "bond": bond,
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": {name: round(1e3 * time.median, 3) for name, time in times.items()},
                "spread": {n: [round(1e3 * t.low, 3), round(1e3 * t.high, 3)] for n, t in times.items()},
                "over_tensornet": {
                    name: round(time.median / times["tensornet"].median, 2) for name, time in times.items()
                },
            }
        )
        result = calls["tensornet"]()
        if isinstance(result, tn.MPO):
            rows[-1] |= {"error": result.truncation_error, "bytes": sum(c.nbytes for c in result.cores)}
        print(rows[-1]["task"], sites, rows[-1]["dtype"], rows[-1]["milliseconds"], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="four sites, to test the script")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torchtt|quimb|tensorkrowch|tntorch|cotengra")
    sizes = [(4, 4)] if options.toy else [(20, 16), (100, 16)]

    def work(_: int) -> list[dict[str, Any]]:
        return [
            row
            for sites, bond in sizes
            for dtype in (torch.float32, torch.float64)
            for row in measure(sites, dtype, bond, 1 if options.toy else options.repeats)
        ]

    return record("chains", with_threads([1], work), folder=options.records)


if __name__ == "__main__":
    main()

"""Decompose one matrix by several families and sizes, and list parameters, error and predicted time.

python examples/search_topology.py FILE.safetensors NAME
python examples/search_topology.py --toy FILE.safetensors     # writes a small file first
To add a family, add its name and options to `FORMS`, for example `("tensor_ring", {"sites": 3})`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tensornet as tn

FORMS = [("low_rank", {})]
FORMS += [(family, {"sites": sites}) for family in ("mpo", "block_tt") for sites in (2, 3)]


def search(matrix, tokens, budgets):
    """Decompose a matrix `(out, in)` in all forms; yield `(error, milliseconds, parameters, description)`."""
    stock = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    stock.weight.data = matrix
    for family, options in FORMS:
        for budget in budgets:
            try:
                layer = tn.nn.TensorNetworkLinear.from_linear(
                    stock, topology=family, param_ratio=budget, **options
                )
            except tn.errors.BudgetError:  # not even bonds of size 1 fit
                continue
            error = float((layer.to_matrix() - matrix).norm() / matrix.norm())
            cost = layer.explain(tokens)
            bonds = [size for size in layer.topology.bond_dims.values() if size > 1]
            description = f"{family} {len(layer.topology.out_dims)} sites, bonds {bonds}"
            yield error, cost[cost.choice].milliseconds, layer.num_params, description


def write_toy(path):
    """Save the matrix of a random chain of three cores, which no other form represents."""
    torch.manual_seed(0)
    topology = tn.topologies.mpo(out_dims=(4, 4, 4), in_dims=(4, 4, 4), max_bond=6)
    save_file({"weight": tn.nn.TensorNetworkLinear(topology).to_matrix().detach()}, path)
    return "weight"


@torch.no_grad()
def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="write FILE first")
    parser.add_argument("file", type=Path, help="a .safetensors file")
    parser.add_argument("name", nargs="?", help="the name of the matrix in the file")
    parser.add_argument("--tokens", type=int, default=256, help="number of tokens to predict the time for")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35, 0.5], help="parameter budgets")
    options = parser.parse_args()
    name = write_toy(options.file) if options.toy else options.name
    found = sorted(set(search(load_file(options.file)[name].float(), options.tokens, options.ratios)))
    lines = [f"{text}: {params:,} parameters, error {e:.5f}, {ms:.4f} ms" for e, ms, params, text in found]
    print(*sorted(lines), sep="\n")
    print("smallest error:", lines[0])


if __name__ == "__main__":
    main()

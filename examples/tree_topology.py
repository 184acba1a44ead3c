"""A topology of your own: binary tree tensor networks. Compare them with low rank on one matrix.

python examples/tree_topology.py FILE.safetensors NAME
python examples/tree_topology.py --toy FILE.safetensors     # writes a small file first
A leaf of the tree carries one out-leg and one in-leg, an inner core joins two branches, and the root joins
the last two. Copy the class, change its two methods, and register an instance by `tn.register_topology`.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tensornet as tn
from tensornet.budget import caps_of_bonds
from tensornet.topologies import Decomposition, TopologyFamily, balanced_factors, check_topology


class TreeFamily(TopologyFamily):
    """Binary tree tensor networks, decomposed from the leaves to the root."""

    name = "tree"

    def build(self, out_features, in_features, *, max_bond=None, sites=4):
        """Bonds of at most `max_bond`, one cap or a sequence, and no larger than the legs on either side."""
        caps = iter(caps_of_bonds(max_bond, 2 * sites - 2, tn.errors.TopologyError))
        outs, ins = balanced_factors(out_features, sites), balanced_factors(in_features, sites)[::-1]
        sizes = {f"o{k}": size for k, size in enumerate(outs)} | {f"i{k}": size for k, size in enumerate(ins)}
        whole = math.prod(outs) * math.prod(ins)
        cores = []
        nodes = []  # (bond to the parent, elements of its legs)

        def add(name, labels, below, legs):
            """Add a core and its bond to the parent."""
            sizes[f"up_{name}"] = min(below, legs, whole // legs, next(caps) or whole)
            cores.append(tn.topologies.CoreSpec(name, (*labels, f"up_{name}")))
            return f"up_{name}", legs

        for k in range(sites):
            legs = outs[k] * ins[k]
            nodes.append(add(f"leaf{k}", (f"o{k}", f"i{k}"), legs, legs))
        while len(nodes) > 2:
            (left, a), (right, b), *nodes = nodes
            below = sizes[left] * sizes[right]
            nodes.append(add(f"join{len(cores)}", (left, right), below, a * b))
        cores.append(tn.topologies.CoreSpec("root", tuple(bond for bond, _ in nodes)))
        labels = [tuple(f"{side}{k}" for k in range(sites)) for side in ("o", "i")]
        return tn.Topology(self.name, tuple(cores), tuple(sizes.items()), *labels, out_features, in_features)

    def decompose_to(self, matrix, topology):
        """Decompose from the leaves to the root by truncated SVDs of unfoldings.

        Left singular vectors are orthonormal, so the squared norms of the discarded parts add up to the exact
        squared error.
        """
        check_topology(self.name, topology, matrix)
        scale = float(matrix.abs().max()) or 1.0
        work = matrix.new_zeros(topology.padded_shape)
        work[: matrix.shape[0], : matrix.shape[1]] = matrix / scale
        axes = [*topology.out_labels, *topology.in_labels]
        work = work.reshape([topology.size_of[x] for x in axes])
        total, lost, cores = float(torch.linalg.vector_norm(work.to(torch.cdouble))), 0.0, []
        for core in topology.cores[:-1]:
            *below, up = core.labels
            order = [*below, *(x for x in axes if x not in below)]
            work = work.permute([axes.index(x) for x in order])
            rows = work.reshape(math.prod(work.shape[: len(below)]), -1)
            norm = float(torch.linalg.vector_norm(rows.to(torch.cdouble)))
            found, bond = tn.truncated_svd(rows, max_rank=topology.size_of[up]), topology.size_of[up]
            lost += (found.error * norm) ** 2
            padding = bond - len(found.S)  # the plan may ask for more than the matrix has
            left = torch.nn.functional.pad(found.U, (0, padding))
            rest = torch.nn.functional.pad(found.S[:, None] * found.Vh, (0, 0, 0, padding)).to(left.dtype)
            cores.append(left.reshape(topology.core_shapes[core.name]))
            work = rest.reshape(bond, *work.shape[len(below) :])
            axes = [up, *order[len(below) :]]
        cores.append((work.permute([axes.index(x) for x in topology.cores[-1].labels]) * scale).contiguous())
        network = tn.TensorNetwork(topology, cores)
        return Decomposition(network, math.sqrt(lost) / total if total else 0.0, "max_bond")


@torch.no_grad()
def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="write FILE first")
    parser.add_argument("file", type=Path, help="a .safetensors file")
    parser.add_argument("name", nargs="?", default="weight", help="the name of the matrix in the file")
    options = parser.parse_args()
    tree = tn.register_topology(TreeFamily())
    if options.toy:  # the matrix of a random tree, which low rank does not represent
        torch.manual_seed(0)
        topology = tree.build(64, 64, max_bond=4, sites=4)
        save_file({"weight": tn.nn.TensorNetworkLinear(topology).to_matrix().contiguous()}, options.file)
    matrix = load_file(options.file)[options.name].float()
    for family in ("tree", "low_rank"):
        made = tn.decompose(matrix, family, param_ratio=0.3)
        print(f"{family}: {made.network.num_params:,} parameters, error {made.error:.5f}")


if __name__ == "__main__":
    main()

"""Generate with a mixture whose experts stay on disk, and count the bytes that a token reads.

python examples/experts_on_disk.py MODEL OUTPUT      # folder of a dense model, new folder
python examples/experts_on_disk.py --toy OUTPUT      # a small random Llama

The private tensors of the experts stay in memory-mapped files, and what the experts share stays in memory.
The matrix of an expert is built when a token is routed to it, and a cache keeps those that were used last.
"""

import argparse
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import tensornet_hf as th
import tensornet_moe as tm

TOY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 64}


class ExpertsOnDisk(tm.ExpertBank):
    """Bank that builds the matrix of an expert when it is needed, by a function `build(bank, expert)`."""

    def __init__(self, bank, build):
        super().__init__(bank.num_experts, (bank.out_features, bank.in_features))
        self.bank, self.build = bank, build

    def expert_matrices(self, experts=None):
        """Return the matrices of some experts, or of all; shape `(experts, out, in)`."""
        index = range(self.num_experts) if experts is None else self.check_experts(experts).tolist()
        return torch.stack([self.build(self.bank, expert) for expert in index])

    def shared_parameters(self):
        """Return what all experts share."""
        return self.bank.shared_parameters()

    def spec(self):
        """Refuse to describe the bank, so that the model is not saved."""
        raise NotImplementedError("Such a model cannot be saved again.")


def load_mapped(kind, folder, kept):
    """Load a model of class `kind` without reading its private experts; keep the last `kept` matrices."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]  # maps files into memory
    # Empty tensors only protect the folder from being loaded without tensornet.
    weights = {name: x for file in files for name, x in file.items() if x.numel()}
    model = kind.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=weights)
    read, private = [], set()

    # The keys are the banks themselves, not an `id`, which another bank could have later. `lru_cache` works
    # with threads, and stores a matrix only after it was built.
    @lru_cache(maxsize=kept)
    def build(bank, expert):
        read.append(sum(x.nbytes for x in bank.private_tensors()) // bank.num_experts)
        return bank.expert_matrices([expert])[0]

    for name, bank in [x for x in model.named_modules() if isinstance(x[1], tm.ExpertBank)]:
        private.update(id(x) for x in bank.private_tensors())
        model.set_submodule(name, ExpertsOnDisk(bank, build))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in private:
            tensor.data = tensor.data.clone()
    return model.eval(), read


@torch.no_grad()
def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("paths", nargs="+", type=Path, metavar="MODEL OUTPUT")
    given = parser.parse_args()
    ids, tokens = torch.arange(8)[None], 64
    for share in ("none", "center"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TOY)) if given.toy else th.load(given.paths[0])
        th.upcycle(model, experts=8, top_k=1, share=share, noise=0.1)
        th.save(model, given.paths[-1] / share)
        matrices = sum(x.num_experts for x in model.modules() if isinstance(x, tm.ExpertBank))
        mapped, read = load_mapped(type(model), given.paths[-1] / share, kept=matrices // 4)
        difference = float((mapped(ids).logits - model.eval()(ids).logits).abs().max())
        read.clear()
        mapped.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        print(f"{share}: {sum(read) / tokens:.1f} bytes for a token, logits differ by {difference:.6f}")


if __name__ == "__main__":
    main()

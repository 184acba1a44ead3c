"""Run one block of a GPT-2 several times, each time with other experts: is depth better than width?

python examples/passes.py TEXT          # text file
python examples/passes.py --toy         # a part of the package's text, a few steps

All passes share the parameters of the block. Each has its own router, and its own experts, which are small
changes of one matrix (Bae et al. 2024, "Relaxed Recursive Transformers", but with experts). So the model is
compared with a dense one of four blocks and as many parameters.
"""

import argparse
from itertools import cycle
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tensornet_moe as tm
from tensornet_hf.embedded import calibration_text, gpt2_path

PASSES, EXPERTS, WINDOW, WIDTH = 4, 8, 128, 80


def gpt2(vocabulary):
    """Build a GPT-2 with random weights."""
    torch.manual_seed(0)
    sizes = {"n_layer": PASSES, "n_embd": WIDTH, "n_inner": 2 * WIDTH, "n_head": 5, "n_positions": WINDOW}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))


def run_in_passes(model):
    """Make all layers share the parameters of the first one, except for routers and experts."""
    sizes = {"d_model": WIDTH, "d_ff": 4 * WIDTH, "activation": "gelu", "gated": False}
    experts = tm.mixture(**sizes, experts=PASSES * EXPERTS, share="base", rank=4).experts
    model.pool = tm.ExpertPool(experts, balance="layer")
    for number, layer in enumerate(model.transformer.h):
        own = range(number * EXPERTS, (number + 1) * EXPERTS)
        layer.mlp = tm.mixture(d_model=WIDTH, pool=model.pool, experts=own, top_k=1)
        # Layers share parameters, not modules, since each has its own place in a cache of keys and values.
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2"):
            source = model.transformer.h[0].get_submodule(name)
            layer.get_submodule(name).weight, layer.get_submodule(name).bias = source.weight, source.bias


def train(model, windows, steps):
    """Train a model, and return its loss on held-out text, in nats per token."""
    optimizer = torch.optim.AdamW(tm.parameter_groups(model.train(), lr=6e-3, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 100, 1 - k / steps))
    batches = cycle(windows[32:].split(16))
    for _ in range(steps):
        batch = next(batches)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "pool"):
            tm.update_biases(model)  # balances the load of the experts
        schedule.step()
    with torch.no_grad():
        return float(model.eval()(input_ids=windows[:32], labels=windows[:32]).loss)


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few steps on the package's text")
    parser.add_argument("text", nargs="?", type=Path)
    given = parser.parse_args()
    text = calibration_text()[:60_000] if given.toy else given.text.read_text()
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    steps = 20 if given.toy else len(windows) // 16
    for name in ("dense", "passes"):
        model = gpt2(len(tokenizer))
        if name == "passes":
            run_in_passes(model)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {size:,} parameters, loss {train(model, windows, steps):.3f}")


if __name__ == "__main__":
    main()

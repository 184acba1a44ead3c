"""Train LoRA adapters on the layers of a compressed model, save them separately, load and merge them.

python examples/lora.py MODEL TEXT OUTPUT     # folder of a compressed model, text file, new folder
python examples/lora.py --toy OUTPUT          # the package's GPT-2, which is compressed first
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import calibration_text, gpt2_path
from tensornet_hf.peft import load_adapters, lora_config, merge_adapters

WINDOW = 128


def compressed_toy():
    """Compress the package's small GPT-2 without calibration."""
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    return model


def loss_of(model, batch):
    """Compute the model's loss on token ids, shape `(windows, WINDOW)`."""
    with torch.no_grad():
        return float(model.eval()(input_ids=batch, labels=batch).loss)


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the embedded model and text")
    parser.add_argument("paths", nargs="+", metavar="MODEL TEXT OUTPUT")
    options = parser.parse_args()
    if options.toy:
        source, text, output = gpt2_path(), calibration_text()[:40_000], options.paths[-1]
        model = compressed_toy()
    else:
        source, text, output = options.paths[0], Path(options.paths[1]).read_text(), options.paths[2]
        model = th.load(source)

    tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(text, verbose=False).input_ids)
    data = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    held_out, batches = data[:8], data[8:].split(4)
    before = loss_of(model, held_out)

    # PEFT does not know compressed layers by itself; `lora_config` registers them.
    adapted = get_peft_model(model, lora_config(model, target_modules="all-linear", r=8, lora_alpha=16))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    for step in range(20 if options.toy else 1000):
        batch = batches[step % len(batches)]
        adapted.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss_of(adapted, held_out)
    adapted.save_pretrained(output)  # writes only the adapters, a few hundred kilobytes

    fresh = compressed_toy() if options.toy else th.load(source)
    merged = merge_adapters(load_adapters(fresh, output))
    print(f"loss: compressed {before:.3f}, with adapters {after:.3f}, merged {loss_of(merged, held_out):.3f}")


if __name__ == "__main__":
    main()

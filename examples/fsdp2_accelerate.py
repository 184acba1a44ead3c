"""Train a compressed model with accelerate and FSDP2, which shards cores like all other parameters.

accelerate launch examples/fsdp2_accelerate.py MODEL TEXT OUTPUT     # as configured by `accelerate config`
torchrun --nproc-per-node 2 examples/fsdp2_accelerate.py --toy OUTPUT     # two processes on the CPU
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import calibration_text, gpt2_path

WINDOW = 64


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the embedded model and text, on CPUs")
    parser.add_argument("paths", nargs="+", metavar="MODEL TEXT OUTPUT")
    options = parser.parse_args()
    if options.toy:
        source, text, output = gpt2_path(), calibration_text()[:20_000], options.paths[-1]
    else:
        source, text, output = options.paths[0], Path(options.paths[1]).read_text(), options.paths[2]

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    accelerator = Accelerator(cpu=options.toy, fsdp_plugin=plugin)
    # Without calibration every process computes the same cores. To calibrate, compress the model once with
    # `tensornet compress` and load the result here.
    model = AutoModelForCausalLM.from_pretrained(source)
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)

    tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(text, verbose=False).input_ids)
    data = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    batches = data[accelerator.process_index :: accelerator.num_processes].split(4)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    steps = 10 if options.toy else 1000
    for step in range(steps):
        batch = batches[step % len(batches)].to(accelerator.device)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            mean = float(accelerator.gather(loss.detach().reshape(1)).mean())
            accelerator.print(f"step {step}: loss {mean:.3f} on {accelerator.num_processes} processes")

    state = accelerator.get_state_dict(model)  # the first process gets all tensors
    if accelerator.is_main_process:
        whole = AutoModelForCausalLM.from_pretrained(source)
        tn.compress(whole, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        whole.load_state_dict(state)
        th.save(whole, output, source=source)
        print(f"saved {type(th.load(output)).__name__} in {output}")
    accelerator.wait_for_everyone()
    # Free everything that uses the process group; otherwise its threads sometimes abort when Python exits.
    model, optimizer, loss = accelerator.free_memory(model, optimizer, loss)
    accelerator.end_training()


if __name__ == "__main__":
    main()

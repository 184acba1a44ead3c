"""Compress a language model, train its cores with the `Trainer` of transformers, and save and load it.

python examples/trainer_after_compression.py MODEL TEXT OUTPUT     # folder or hub id, text file, new folder
python examples/trainer_after_compression.py --toy OUTPUT          # the package's GPT-2, a few steps
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import calibration_text, gpt2_path

WINDOW = 128


def windows(tokenizer, text):
    """Cut a text into windows of tokens, shape `(windows, WINDOW)`."""
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)


def loss_of(model, batch):
    """Compute the model's loss on token ids, shape `(windows, WINDOW)`."""
    with torch.no_grad():
        return float(model.eval()(batch, labels=batch).loss)


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the embedded model and text")
    parser.add_argument("paths", nargs="+", metavar="MODEL TEXT OUTPUT")
    options = parser.parse_args()
    if options.toy:
        source, text, output = gpt2_path(), calibration_text()[:40_000], options.paths[-1]
    else:
        source, text, output = options.paths[0], Path(options.paths[1]).read_text(), options.paths[2]

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    data = windows(tokenizer, text)
    held_out, data = data[:8], data[8:]
    dense = loss_of(model, held_out)

    config = tn.CompressionConfig(param_ratio=0.3)
    tn.compress(model, config, calibration=data[:64].split(8), progress=False)
    compressed = loss_of(model, held_out)

    arguments = TrainingArguments(
        output_dir=str(Path(output) / "trainer"),
        max_steps=40 if options.toy else 1000,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        weight_decay=0.0,  # weight decay would shrink each core, and their product even more
        save_strategy="no",
        report_to=[],
        use_cpu=options.toy,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    examples = [{"input_ids": window, "labels": window} for window in data]
    Trainer(model, arguments, train_dataset=examples).train()
    trained = loss_of(model.cpu(), held_out)

    th.save(model, Path(output) / "model", source=source)
    again = loss_of(th.load(Path(output) / "model"), held_out)
    print(f"loss: dense {dense:.3f}, compressed {compressed:.3f}, trained {trained:.3f}, loaded {again:.3f}")


if __name__ == "__main__":
    main()

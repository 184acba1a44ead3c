"""Compress a sentence encoder, and compare its vectors with those of the dense model.

python examples/sentence_encoder.py MODEL SENTENCES OUTPUT   # folder or hub id, file of sentences, new folder
python examples/sentence_encoder.py --toy OUTPUT             # a random BERT
"""

import argparse
import copy
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import tensornet as tn
import tensornet_hf as th


def toy():
    """Make a random encoder and batches of random tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=200, max_position_embeddings=32, **sizes)).eval()
    batches = []
    for _ in range(8):
        lengths = torch.randint(4, 13, (16, 1))
        mask = (torch.arange(12) < lengths).long()
        batches.append({"input_ids": torch.randint(3, 200, (16, 12)) * mask, "attention_mask": mask})
    return model, batches


def pooled(model, batch):
    """Average the hidden states without padding, and normalize: shape `(sentences, hidden_size)`."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a random model")
    parser.add_argument("--bits", type=float, default=4.25, help="bits per weight of the linear layers")
    parser.add_argument("paths", nargs="+", metavar="MODEL SENTENCES OUTPUT")
    options = parser.parse_args()
    if options.toy:
        model, batches = toy()
    else:
        model = AutoModel.from_pretrained(options.paths[0]).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.paths[0])
        lines = [line for line in Path(options.paths[1]).read_text().splitlines() if line.strip()]
        parts = [lines[k : k + 16] for k in range(0, len(lines), 16)]
        batches = [
            dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts
        ]
    held_out, calibration = batches[0], batches[1:]

    dense = copy.deepcopy(model)
    # The batches have no labels, so the loss is the distance from the dense model's outputs.
    config = tn.CompressionConfig(bits_per_weight=options.bits)
    report = tn.compress(model, config, calibration=calibration, progress=False)
    print(report)

    output = options.paths[-1]
    source = None if options.toy else options.paths[0]
    th.save(model, output, source=source)
    vectors, expected = pooled(th.load(output).eval(), held_out), pooled(dense, held_out)
    cosine = float(cosine_similarity(vectors, expected).mean())
    print(f"mean cosine similarity to the dense model's vectors: {cosine:.4f}")
    change = (vectors @ vectors.T - expected @ expected.T).abs().max()
    print(f"largest change of the similarity of two sentences: {float(change):.4f}")


if __name__ == "__main__":
    main()

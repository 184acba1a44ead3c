"""Train a small convolutional network, compress it, heal it, and save it to a file.

python examples/compress_cnn.py cnn.safetensors     # --toy: fewer steps
To use your own network, replace `Network` and `images`; convolutions and linear layers are found by type.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

import tensornet as tn


class Network(nn.Sequential):
    """Network of three convolutions and two linear layers that classifies three textures."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3)),
        )


def images(count, seed):
    """Draw images `(count, 1, 16, 16)` of noisy stripes or checkers, and their labels, shape `(count,)`."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(3, (count,), generator=generator)
    rows = (torch.arange(16) // 2 % 2).float().reshape(16, 1).expand(16, 16)
    textures = torch.stack([rows, rows.T, (rows + rows.T) % 2]) - 0.5
    noise = torch.randn(count, 1, 16, 16, generator=generator)
    return textures[kinds].unsqueeze(1) + 2.0 * noise, kinds


def accuracy(model, x, kinds):
    """Compute the fraction of images that are classified correctly."""
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == kinds).float().mean())


def train(model, batches, steps):
    """Train a model with AdamW, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x, kinds = batches[step % len(batches)]
        nn.functional.cross_entropy(model.train()(x), kinds).backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="fewer steps")
    parser.add_argument("output", type=Path, help="a new .safetensors file")
    options = parser.parse_args()
    steps = 60 if options.toy else 600
    torch.manual_seed(0)
    batches, held_out = [images(64, seed) for seed in range(16)], images(512, 1000)
    model = Network()
    train(model, batches, steps)
    teacher = copy.deepcopy(model)
    print(f"dense: {accuracy(teacher, *held_out):.3f}")
    config = tn.CompressionConfig(param_ratio=0.15, target_modules="all")
    print(tn.compress(model, config, calibration=batches, progress=False))
    print(f"compressed: {accuracy(model, *held_out):.3f}")
    tn.heal(model, teacher, batches, steps=steps, lr=3e-3)
    print(f"healed: {accuracy(model, *held_out):.3f}")

    tn.save_model(model, options.output)
    again = tn.load_model(Network(), options.output)
    print(f"loaded: {accuracy(again, *held_out):.3f}")


if __name__ == "__main__":
    main()

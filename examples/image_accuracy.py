"""Measure the accuracy of a vision model, compressed or dense, on images in one folder per class.

python examples/image_accuracy.py MODEL IMAGES   # IMAGES/CLASS/name.png; CLASS is a name or a number
python examples/image_accuracy.py --toy FOLDER   # a random ViT and six images
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # or AutoImageProcessor

import tensornet_hf as th


def toy(folder):
    """Save a random ViT with its image processor, and two images for each of three classes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)).save_pretrained(
        folder / "vit"
    )
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for k in range(6):
        place = folder / "images" / str(k % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), color=(40 * k, 40, 200)).save(place / f"{k}.png")
    return folder / "vit", folder / "images"


def main():
    """Run the example."""
    paths = [Path(word) for word in sys.argv[1:] if word != "--toy"]
    folder, images = toy(paths[0]) if "--toy" in sys.argv else paths
    model, processor = th.load(folder).eval(), ViTImageProcessorPil.from_pretrained(folder)
    number = {str(k): k for k in model.config.id2label} | model.config.label2id
    correct = []
    for path in sorted(images.glob("*/*")):
        with Image.open(path) as opened, torch.no_grad():
            logits = model(**processor(opened.convert("RGB"), return_tensors="pt")).logits
        correct.append(int(logits.argmax()) == number[path.parent.name])
    print(f"accuracy: {sum(correct) / len(correct):.4f} on {len(correct)} images")


if __name__ == "__main__":
    main()

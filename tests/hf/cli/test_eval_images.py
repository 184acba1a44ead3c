"""`tensornet eval --images`: against a loop over single images, and its bad input."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import tensornet_hf as th
from tensornet.errors import FormatError, TargetError
from tensornet_hf.evaluation import measure_image_accuracy, read_images
from tensornet_hf.evaluation.accuracy import accuracy_of, class_index

Run = Callable[..., tuple[int, str, str]]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
CLASSES = dict(enumerate(NAMES))


def vit(folder: Path, channels: int = 3, names: Sequence[str] = NAMES) -> Path:
    """A random vision transformer that tells images apart, with its processor."""
    torch.manual_seed(1)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            num_channels=channels,
            initializer_range=0.5,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=half, image_std=half)
    return saved(model, processor, folder)


def resnet(folder: Path) -> Path:
    """A random residual network whose batch normalization has seen something."""
    torch.manual_seed(1)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(
        ResNetConfig(**sizes, id2label=CLASSES, label2id={name: k for k, name in CLASSES.items()})
    )
    model.train()(pixel_values=torch.randn(32, 3, 32, 32))
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    return saved(model.eval(), processor, folder)


def saved(model: PreTrainedModel, processor: object, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of several sizes: noise of one colour each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        size, tint = (20 + k, 17 + 3 * (k % 4), 1), 255 * torch.rand(3, generator=generator)
        noise = 60 * torch.randn((*size[:2], 3), generator=generator)
        found.append(Image.fromarray((tint + noise).clamp(0, 255).byte().numpy()))
    return found


def truth(model: nn.Module, processor: Callable, images: Sequence[Image.Image]) -> torch.Tensor:
    """Log probabilities, one image at a time."""
    with torch.no_grad():
        rows = [model(**processor(images=image, return_tensors="pt")).logits[0] for image in images]
    return torch.stack(rows).double().log_softmax(-1)


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_folder_of_classes_is_counted(tensornet: Run, make: Callable[[Path], Path]) -> None:
    model_folder = make(Path("model"))
    model, processor = th.load(model_folder).eval(), _processor(make)
    images = pictures(18)
    scores = truth(model, processor, images)
    order = scores.argsort(-1, descending=True)
    assert len(set(order[:, 0].tolist())) > 1, "the model must tell some of the images apart"
    wanted = [int(order[k, (0, 0, 3, 6)[k % 4]]) for k in range(len(images))]  # first, fourth or last choice
    for k, (image, label) in enumerate(zip(images, wanted, strict=True)):
        place = Path("images", NAMES[label] if label % 2 else str(label))
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{k:02}.png")
    Path("images", "README.md").write_text("of the whole folder")
    Path("images", NAMES[1]).mkdir(exist_ok=True)
    Path("images", NAMES[1], ".DS_Store").write_text("hidden")
    status, out, err = tensornet("eval", model_folder, "--images", "images", "--batch", 4, "--json")
    assert status == 0, err
    found = json.loads(out)["images"]
    rows = torch.arange(len(images))
    assert found["examples"] == 18
    assert found["accuracy"] == pytest.approx(10 / 18)  # 5 + 5 of the first choice
    assert found["top5"] == pytest.approx(14 / 18)  # and 4 of the fourth
    assert found["loss"] == pytest.approx(float(-scores[rows, torch.tensor(wanted)].mean()), abs=1e-4)
    status, out, _ = tensornet("eval", model_folder, "--images", "images")
    assert (status, out.splitlines()[0]) == (0, "accuracy 0.5556")
    assert "among the five likeliest 0.7778" in out
    assert "18 labelled images" in out


def _processor(make: Callable[[Path], Path]) -> Callable:
    if make is resnet:
        return ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    half = [0.5] * 3
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=half, image_std=half)


def test_a_compressed_model_keeps_its_processor_and_its_accuracy(tensornet: Run) -> None:
    dense = vit(Path("dense"))
    listing = []
    for k, image in enumerate(pictures(12)):
        Path("pictures").mkdir(exist_ok=True)
        image.save(f"pictures/{k}.webp", lossless=True)
        label = int(truth(th.load(dense).eval(), _processor(vit), [image]).argmax())
        listing.append({"image": f"pictures/{k}.webp", "label": NAMES[label] if k % 2 else label})
    Path("list.jsonl").write_text("\n".join(map(json.dumps, listing)))
    how = ("--formats", "int8", "--bits", 9, "--objective", "weight")
    assert tensornet("compress", dense, "small", *how)[0] == 0
    for folder, least in ((dense, 1.0), ("small", 11 / 12)):
        status, out, err = tensornet("eval", folder, "--images", "list.jsonl", "--json")
        assert status == 0, err
        assert json.loads(out)["images"]["accuracy"] >= least


def test_images_are_turned_and_converted_as_the_model_needs(tmp_path: Path) -> None:
    (upright,) = pictures(1)
    turned, orientation = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x0112] = 6  # turn by 270 degrees to see it upright
    turned.save(tmp_path / "turned.png", exif=orientation)
    upright.convert("P").save(tmp_path / "palette.png")
    upright.convert("L").save(tmp_path / "gray.png")
    examples = [(tmp_path / name, 2) for name in ("turned.png", "palette.png", "gray.png")]
    for channels, mode in ((3, "RGB"), (1, "L")):
        folder = vit(tmp_path / f"of_{channels}", channels)
        model = th.load(folder).eval()
        half = [0.5] * channels
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=half, image_std=half)
        seen = [upright, upright.convert("P"), upright.convert("L")]
        for example, image in zip(examples, seen, strict=True):
            found = measure_image_accuracy(model, folder, [example])
            expected = truth(model, processor, [image.convert(mode)])
            assert found.loss == pytest.approx(float(-expected[0, 2]), abs=1e-4)


def test_accuracy_of_few_and_of_many_classes() -> None:
    """Ranks of the label, counted by hand: 1, 2, 5, 6."""
    logits = -torch.arange(8.0).repeat(4, 1)
    found = accuracy_of(logits, torch.tensor([0, 1, 4, 5]))
    assert (found.accuracy, found.top5, found.examples) == (0.25, 0.75, 4)
    total = float(torch.arange(8.0).neg().double().exp().sum().log())
    assert found.loss == pytest.approx(total + 10 / 4)
    assert accuracy_of(logits[:, :5], torch.tensor([0, 1, 4, 4])).top5 is None


def test_labels_by_name_and_number() -> None:
    names = {0: "1", 1: "crane", 2: "crane"}  # as in ImageNet, where two classes are cranes
    assert (class_index("1", names), class_index(1, names)) == (0, 1)
    with pytest.raises(ValueError, match="'crane' names classes 1, 2: write the number"):
        class_index("crane", names)
    many = {k: f"class {k}" for k in range(1000)}
    with pytest.raises(ValueError, match=r"'x' is not a class; the model has class 0 \(0\), .* and 992 more"):
        class_index("x", many)


def test_bad_folders(tmp_path: Path) -> None:
    (image,) = pictures(1)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_images(tmp_path / "nowhere", CLASSES)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FormatError, match=r"holds no images: expected .*/CLASS/NAME\.png"):
        read_images(tmp_path, CLASSES)
    image.save(tmp_path / "cat" / "a.png")
    assert read_images(tmp_path, CLASSES) == [(tmp_path / "cat" / "a.png", 2)]
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(FormatError, match=r"notes\.txt is not an image, by its name"):
        read_images(tmp_path, CLASSES)
    (tmp_path / "cat" / "notes.txt").unlink()
    (tmp_path / "7").mkdir()
    known = r"folder 7: label '7' is not a class; the model has ant \(0\), .*gnu \(6\)"
    with pytest.raises(FormatError, match=known):
        read_images(tmp_path, CLASSES)
    (tmp_path / "7").rmdir()
    image.save(tmp_path / "b.png")
    with pytest.raises(FormatError, match=r"b\.png lies in no folder of a class"):
        read_images(tmp_path, CLASSES)


def test_bad_lists(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    for line, match in (
        ('{"text": "a.png", "label": 1}', r'line 1: expected \{"image": "\.\.\.", "label"'),
        ('{"image": "a.png", "label": "hen"}', r"line 1: label 'hen' is not a class; the model has ant"),
    ):
        file.write_text(line)
        with pytest.raises(FormatError, match=match):
            read_images(file, CLASSES)
    file.write_text('{"image": "a.png", "label": "cat"}')
    with pytest.raises(FileNotFoundError, match=r"list\.jsonl lists .*a\.png, which is not there"):
        read_images(file, CLASSES)


def test_unreadable_images_and_folders_without_a_processor(tensornet: Run) -> None:
    folder = vit(Path("model"))
    place = Path("images", "cat")
    place.mkdir(parents=True)
    (image,) = pictures(1)
    image.save(place / "a.png")
    whole = (place / "a.png").read_bytes()
    for content, why in (
        (b"no image at all", "UnidentifiedImageError"),
        (whole[: len(whole) // 2], "OSError"),
    ):
        (place / "b.png").write_bytes(content)
        status, _, err = tensornet("eval", folder, "--images", "images")
        assert status == 1
        assert f"b.png cannot be read as an image: {why}" in err
    (place / "b.png").unlink()
    (folder / "preprocessor_config.json").unlink()
    status, _, err = tensornet("eval", folder, "--images", "images")
    assert status == 1
    assert "has no image processor that can be read" in err
    assert "Copy the preprocessor_config.json of the original model into it" in err


def test_images_of_several_sizes_need_a_processor_that_resizes(tmp_path: Path) -> None:
    folder = vit(tmp_path / "model")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "do_resize": False}))
    examples = []
    for k, image in enumerate(pictures(2)):
        image.save(tmp_path / f"{k}.png")
        examples.append((tmp_path / f"{k}.png", 0))
    with pytest.raises(
        FormatError, match=r"1\.png \(3, 21, 20\) and .*0\.png \(3, 20, 17\).*do_resize.*--batch 1"
    ):
        measure_image_accuracy(th.load(folder), folder, examples)


def test_models_of_another_kind(tensornet: Run, encoder: Path, classifier: Path) -> None:
    Path("images", "wet").mkdir(parents=True)
    for folder, name in ((encoder, "BertModel"), (classifier, "BertForSequenceClassification")):
        status, _, err = tensornet("eval", folder, "--images", "images")
        assert status == 1
        assert f"{name} is not a classifier of images, which --images needs" in err
    with pytest.raises(TargetError, match="is not a classifier of images"):
        measure_image_accuracy(th.load(encoder), encoder, [(Path("a.png"), 0)])


def test_without_pillow_the_pip_line_is_named(tensornet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = vit(Path("model"))
    Path("images", "cat").mkdir(parents=True)
    monkeypatch.setattr("tensornet.optional.find_spec", lambda name: None)
    status, out, err = tensornet("eval", folder, "--images", "images")
    assert (status, out) == (1, "")
    assert "tensornet eval --images needs PIL" in err
    assert "pip install 'tensornet-torch[viz]'" in err

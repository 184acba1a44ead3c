"""Classifiers of images: folders of labelled images, and accuracy on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoImageProcessor, PreTrainedModel

from tensornet.context import in_eval_mode
from tensornet.errors import FormatError, TargetError
from tensornet.optional import require
from tensornet.progress import progress_bar
from tensornet_hf.evaluation.accuracy import Accuracy, accuracy_of, class_index, is_class_logits
from tensornet_hf.evaluation.classifiers import read_examples
from tensornet_hf.text.tokens import first_line

_USER = "tensornet eval --images"


def read_images(path: Path, names: Mapping[int, str]) -> list[tuple[Path, int]]:
    """List labelled images: `FOLDER/CLASS/image.png`, or a file of JSON lines.

    Args:
        path: folder with one folder for each class, by name or number; or a file of lines
            `{"image": ..., "label": ...}`, with paths relative to its own folder.
        names: of the classes by number.

    Returns:
        Paths with the numbers of their classes, sorted by path within a folder.

    Raises:
        FileNotFoundError: there is no such file or folder, or an image of the file is absent.
        FormatError: an unknown class, a line of another form, or no images.
        MissingDependencyError: Pillow is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from tensornet_hf.evaluation.images import read_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "cat").mkdir()
        ...     Image.new("RGB", (8, 8)).save(Path(folder, "cat", "a.png"))
        ...     [(image.name, label) for image, label in read_images(Path(folder), {0: "dog", 1: "cat"})]
        [('a.png', 1)]
    """
    _require_pillow()
    if path.is_dir():
        return _of_folder(path, names)
    examples = [(path.parent / image, label) for image, label in read_examples(path, names, key="image")]
    for image, _ in examples:
        if not image.is_file():
            raise FileNotFoundError(f"{path} lists {image}, which is not there.")
    return examples


@torch.no_grad()
def measure_image_accuracy(
    model: PreTrainedModel,
    folder: Path,
    examples: Sequence[tuple[Path, int]],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> Accuracy:
    """Measure the accuracy of a classifier of images.

    Images are turned as their EXIF entry says, converted to RGB (to gray for models of one channel), and go
    through the image processor of the folder.

    Args:
        model: of the kind `AutoModelForImageClassification`.
        folder: holds its image processor.
        examples: paths of images with the numbers of their classes, see `read_images`.
        batch_size: images run at once.
        progress: show a progress bar.

    Raises:
        TargetError: the model is not a classifier of images.
        FormatError: the folder has no image processor, or an image cannot be read.
        MissingDependencyError: Pillow is not installed.
    """
    _require_pillow()
    require_image_classifier(model)
    processor = load_image_processor(folder)
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    found = []
    starts = range(0, len(examples), batch_size)
    with in_eval_mode(model):
        for start in progress_bar(starts, desc="images", unit="batch", disable=not progress):
            paths = [path for path, _ in examples[start : start + batch_size]]
            pixels = _batch([_pixels(path, processor, mode) for path in paths], paths)
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits
            if not is_class_logits(logits):
                raise TargetError(f"{type(model).__name__} returns no logits of two or more classes.")
            found.append(logits.float().cpu())
    return accuracy_of(torch.cat(found), torch.tensor([label for _, label in examples]))


def require_image_classifier(model: PreTrainedModel) -> None:
    """Raise TargetError unless a model is of the kind `AutoModelForImageClassification`.

    Raises:
        TargetError: another kind; the message names the class, and what measures models of other kinds.
    """
    kind = type(model.config)
    known: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if kind not in known or not isinstance(model, known[kind]):  # one class, or a tuple of them
        raise TargetError(
            f"{type(model).__name__} is not a classifier of images, which --images needs; measure language "
            "models by --text or --tasks, encoders by --sentences, classifiers of texts by --labels."
        )


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a model folder; without torchvision that of Pillow.

    Raises:
        FormatError: transformers can read none there.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise FormatError(
            f"{folder} has no image processor that can be read: {first_line(error)}. Copy the "
            "preprocessor_config.json of the original model into it."
        ) from error


def _require_pillow() -> None:
    """Raise MissingDependencyError unless Pillow is installed, which comes with matplotlib."""
    require(("PIL",), extra="viz", user=_USER)


def _of_folder(folder: Path, names: Mapping[int, str]) -> list[tuple[Path, int]]:
    """List the images in the folders of classes; other files beside these folders are ignored."""
    from PIL import Image

    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if stray := [entry for entry in entries if entry.is_file() and entry.suffix.lower() in endings]:
        raise FormatError(
            f"{stray[0]} lies in no folder of a class: expected {folder}/CLASS/{stray[0].name}."
        )
    found = []
    for place in (entry for entry in entries if entry.is_dir()):
        index = _class_of_folder(place, names)
        for image in sorted(place.iterdir()):
            if image.name.startswith("."):
                continue
            if not image.is_file() or image.suffix.lower() not in endings:
                raise FormatError(
                    f"{image} is not an image, by its name: a folder of a class holds images alone."
                )
            found.append((image, index))
    if not found:
        raise FormatError(
            f"{folder} holds no images: expected {folder}/CLASS/NAME.png, a folder for each class."
        )
    return found


def _class_of_folder(place: Path, names: Mapping[int, str]) -> int:
    """Return the class that a folder is named after, by name or else by number."""
    try:
        return class_index(place.name, names)
    except ValueError as error:
        if place.name.isdecimal() and int(place.name) in names:
            return int(place.name)
        raise FormatError(f"{place.parent}, folder {place.name}: {error}") from error


def _pixels(path: Path, processor: Any, mode: str) -> Tensor:
    """Read and process one image: shape `(channels, height, width)`.

    Raises:
        FormatError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert(mode)
    except Exception as error:  # of the decoders of Pillow, in all their ways
        raise FormatError(
            f"{path} cannot be read as an image: {type(error).__name__}: {first_line(error)}. Write it "
            "anew, or take it away."
        ) from error
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _batch(images: Sequence[Tensor], paths: Sequence[Path]) -> Tensor:
    """Stack processed images, shape `(images, channels, height, width)`.

    Raises:
        FormatError: the processor left them of several sizes.
    """
    for image, path in zip(images, paths, strict=True):
        if image.shape != images[0].shape:
            raise FormatError(
                f"The image processor makes {path} {tuple(image.shape)} and {paths[0]} "
                f"{tuple(images[0].shape)}, which do not fit into one batch: set do_resize in "
                "preprocessor_config.json, or run --batch 1."
            )
    return torch.stack(list(images))

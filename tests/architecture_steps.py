"""The way that every architecture of docs/architectures.md goes, step by step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from folder_runs import compress_files
from hf_architectures import EXCEPTIONS, Architecture
from hf_models import assert_generates_alike
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.coverage import BIASES
from tensornet.nn.extension import ProvidedData
from tensornet.nn.layer_kinds import ScaledEmbedding, embedding_scale
from tensornet.nn.module import NetworkModule

EVERY_LAYER = tn.CompressionConfig(target_modules="all", topology="mpo")
SIXTY = tn.CompressionConfig(param_ratio=0.6)
#: Rows of which a smaller share of the matrices is covered say why.
EXPLAINED = 0.95
#: Two networks of the same cores may be contracted in another order.
CLOSE = 2e-3


def floats(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors of a model's output, caches excepted."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if "cache" not in key and "past_key" not in key:
                yield from floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floats(value)


def outputs(model: nn.Module, architecture: Architecture) -> list[Tensor]:
    """What a model says to the batch of its architecture."""
    torch.manual_seed(0)  # attention of some depends on random numbers
    with torch.no_grad():
        return list(floats(model(**architecture.batch())))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = CLOSE) -> None:
    """Compare outputs relative to their size."""
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite)
        scale = max(1e-6, float(b[finite].abs().max())) if finite.any() else 1.0
        torch.testing.assert_close(a[finite], b[finite], atol=tolerance * scale, rtol=0)


def layers(model: nn.Module) -> dict[str, NetworkModule]:
    """The tensor-network layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


class Trial:
    """Results that the steps share, made when the first step asks for them."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        """Remove what was written."""
        self._folder.cleanup()

    @cached_property
    def dense(self) -> PreTrainedModel:
        return self.architecture.dense

    @cached_property
    def expected(self) -> list[Tensor]:
        return outputs(self.dense, self.architecture)

    @cached_property
    def _full(self) -> tuple[PreTrainedModel, tn.CompressionReport]:
        model = self.architecture.dense
        return model, tn.compress(model, EVERY_LAYER, progress=False)

    @property
    def full(self) -> PreTrainedModel:
        return self._full[0]

    @property
    def full_report(self) -> tn.CompressionReport:
        return self._full[1]

    @cached_property
    def saved(self) -> Path:
        self.full.save_pretrained(self.folder / "full")
        return self.folder / "full"

    @cached_property
    def loaded(self) -> PreTrainedModel:
        return th.load(self.saved)

    @cached_property
    def data(self) -> ProvidedData:
        own = self.architecture.calibration
        return ProvidedData([self.architecture.batch(labels=True)] if own is None else own(), "random tokens")

    @cached_property
    def small(self) -> tuple[PreTrainedModel, tn.CompressionReport]:
        model = self.architecture.dense
        return model, tn.compress(model, SIXTY, calibration=self.data, progress=False)


def dense(trial: Trial) -> None:
    """The dense model runs and trains."""
    assert trial.expected
    loss(trial.architecture.dense, trial.architecture).backward()


def full_rank(trial: Trial) -> None:
    """With all layers as cores of full rank, the outputs are those of the dense model."""
    assert layers(trial.full)
    assert_close(outputs(trial.full, trial.architecture), trial.expected)


def load(trial: Trial) -> None:
    """`tensornet_hf.load` restores the saved model."""
    full, loaded = trial.full, trial.loaded
    assert type(loaded) is type(full)
    assert layers(loaded).keys() == layers(full).keys()
    assert sorted(n for n, _ in loaded.named_parameters()) == sorted(n for n, _ in full.named_parameters())
    assert_close(outputs(loaded, trial.architecture), outputs(full, trial.architecture), 1e-6)


def auto_model(trial: Trial) -> None:
    """`AutoModel` loads the weights in the folder."""
    model = AutoModel.from_pretrained(trial.saved)
    stored = trial.full.state_dict()
    found = 0
    for name, tensor in model.state_dict().items():
        sources = [n for n in stored if n == name or n.endswith(f".{name}")]
        if sources:  # inside or outside the module that holds the head
            own = f"{trial.full.base_model_prefix}.{name}"
            source = own if own in sources else min(sources, key=len)
            assert torch.equal(tensor, stored[source]), name
            found += 1
    if found < len(model.state_dict()):  # a pooler, or a class of other parts: new to the dense model as well
        assert found >= len(model.state_dict()) - len(unknown_to_auto_model(trial))
    assert layers(model)


def unknown_to_auto_model(trial: Trial) -> set[str]:
    """Weights that `AutoModel` does not find in the folder of the dense model."""
    trial.dense.save_pretrained(trial.folder / "dense")
    _, info = AutoModel.from_pretrained(trial.folder / "dense", output_loading_info=True)
    return set(info["missing_keys"])


def generate(trial: Trial) -> None:
    """The loaded model continues its input like the dense model."""
    inputs = trial.architecture.batch()
    inputs.pop("decoder_input_ids", None)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    found = trial.loaded.generate(**inputs, **options)
    assert_generates_alike(found, trial.dense.generate(**inputs, **options), CLOSE)


def decompress(trial: Trial) -> None:
    """Decompressing restores the weights, and the classes of layers, except for scaled embeddings."""
    model = th.decompress(th.load(trial.saved))
    assert not layers(model)
    expected, state = trial.dense.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert_close([tensor.float()], [expected[name].float()])
    for name, module in trial.dense.named_modules():  # parametrizations make a class for each module
        now, scale = model.get_submodule(name), embedding_scale(module)
        if isinstance(now, ScaledEmbedding):
            assert now.scale == scale is not None, name
        else:
            assert type(now).__name__ == type(module).__name__, name
    assert_close(outputs(model, trial.architecture), trial.expected)


def sixty(trial: Trial) -> None:
    """At 60 % of the parameters every error is within its certified bound, and the model runs."""
    model, report = trial.small
    assert report.param_ratio <= 0.6
    rebuilt_model = copy.deepcopy(model)
    th.decompress(rebuilt_model)
    original, rebuilt = trial.dense.state_dict(), rebuilt_model.state_dict()
    assert rebuilt.keys() == original.keys()
    bounds = {f"{layer.name}.weight": layer.error for layer in report.layers}
    worst = max(bounds.values())  # for parameters that hold several matrices
    for name, before in original.items():
        error = float((before - rebuilt[name]).float().norm())
        assert error <= (bounds.get(name, worst) * 1.001 + 1e-5) * float(before.float().norm()), name
    assert_close(outputs(model, trial.architecture), outputs(rebuilt_model, trial.architecture))


def file_to_file(trial: Trial) -> None:
    """`compress_folder` writes the same model as compressing in memory."""
    trial.dense.save_pretrained(trial.folder / "dense")
    config = replace(SIXTY, method="svd")
    compress_files(trial.folder / "dense", trial.folder / "small", config)
    model, small = th.load(trial.folder / "small"), th.load(trial.folder / "dense")
    tn.compress(small, config, progress=False)
    assert layers(model).keys() == layers(small).keys()
    assert_close(outputs(model, trial.architecture), outputs(small, trial.architecture), 1e-4)


def training_step(trial: Trial) -> None:
    """Loss and gradients at full rank are those of the dense model, and a step changes every core."""
    model, stock = th.load(trial.saved), trial.architecture.dense
    losses = [loss(x, trial.architecture) for x in (model, stock)]
    for value in losses:
        value.backward()
    assert_close([losses[0].detach()], [losses[1].detach()])
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    scale = max(float(x.abs().max()) for x in gradients.values() if x is not None and x.numel())
    for name, parameter in model.named_parameters():
        if name in gradients and gradients[name] is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=CLOSE * scale, rtol=CLOSE)
    for name, layer in layers(model).items():
        if gradients.get(f"{name}.weight") is not None:
            assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3 / max(scale, 1e-6)).step()
    assert bool(torch.isfinite(loss(model, trial.architecture)))


def loss(model: nn.Module, architecture: Architecture) -> Tensor:
    """The model's own loss, or the mean square of its outputs."""
    torch.manual_seed(0)
    output = model(**architecture.batch(labels=True))
    if getattr(output, "loss", None) is not None:
        return output.loss
    values = [x for x in floats(output) if x.requires_grad]
    return torch.stack([torch.where(torch.isfinite(x), x, 0).square().mean() for x in values]).sum()


STEPS: dict[str, Callable[[Trial], None]] = {
    "dense": dense,
    "full rank": full_rank,
    "load": load,
    "AutoModel": auto_model,
    "generate": generate,
    "decompress": decompress,
    "60 %": sixty,
    "file to file": file_to_file,
    "training step": training_step,
}


def steps_of(architecture: Architecture) -> list[str]:
    """Names of the steps that an architecture goes; none follows where the dense model itself fails."""
    if "dense" in EXCEPTIONS.get(architecture.name, {}):
        return ["dense"]
    return [name for name in STEPS if name != "generate" or architecture.generates]


def attempt(trial: Trial, step: str) -> Exception | None:
    """The error of a step, None if it is right."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Left dense")
            STEPS[step](trial)
    except Exception as error:
        return error
    return None


def reached(trial: Trial) -> dict[str, Any]:
    """Parameters of the model, and the shares that are considered; None where a step is refused.

    `all` and `usual` are shares of all parameters, and `matrices` of those that are no vectors. Biases and
    norms are a large part of these small models only.
    """
    excepted = EXCEPTIONS.get(trial.architecture.name, {})
    if "dense" in excepted:
        return {"parameters": sum(p.numel() for p in trial.dense.parameters())}
    everything, usual = trial.full_report.coverage, None
    if "60 %" not in excepted:
        usual = trial.small[1].coverage.share
    sizes = [(type(m).__name__, p) for m in trial.dense.modules() for p in m.parameters(recurse=False)]
    vectors = sum(p.numel() for p in trial.dense.parameters() if p.ndim < 2)
    matrices = everything.total - vectors
    found = {
        "parameters": everything.total,
        "all": round(everything.share, 3),
        "matrices": round(everything.covered / matrices, 3),
        "usual": usual and round(usual, 3),
    }
    if (
        everything.covered < EXPLAINED * matrices
    ):  # with the types that hold most of the rest, and the reasons
        of_matrices = {kind for kind, p in sizes if p.ndim >= 2}
        left = {
            k: x for k, x in everything.unknown.items() if k != BIASES and k.split(" (")[0] in of_matrices
        }
        found["left"] = [label for label, size in left.items() if size > matrices / 100]
    return found

"""Compressed models and mixtures leave Python: torch.export, AOTInductor and ONNX, for any token count."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.quantization.formats import FP4_LEVELS

TOKENS = torch.export.Dim("tokens", min=2, max=4096)
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def compressed(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    method = "nearest" if "formats" in options else "svd"
    config = tn.CompressionConfig(target_modules="all", method=method, **options)  # type: ignore[arg-type]
    tn.compress(model, config, progress=False)
    return model.eval()


def mixture(capacity_factor: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    up = tm.SharedCoreExperts.from_dense(torch.randn(64, 32) / 8, num_experts=4, noise=0.1)
    down = tm.SharedCoreExperts.from_dense(torch.randn(32, 64) / 8, num_experts=4, noise=0.1)
    experts = tm.ExpertFFN({"up": up, "down": down})
    router = tm.TopKRouter(32, 4, top_k=2)
    moe = tm.SharedCoreMoE(router, experts, capacity_factor=capacity_factor)
    return nn.Sequential(nn.Linear(32, 32), moe).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "low rank": lambda: compressed(topology="low_rank", param_ratio=0.5),
    "mpo": lambda: compressed(topology="mpo", topology_options={"sites": 2}, param_ratio=0.5),
    "int8": lambda: compressed(formats=("int8",), bits_per_weight=9),
    "int4": lambda: compressed(formats=("int4",), bits_per_weight=5.5),
    "mxfp4": lambda: compressed(formats=("mxfp4",), bits_per_weight=5),
    "nvfp4": lambda: compressed(formats=("nvfp4",), bits_per_weight=5),
    "int3": lambda: compressed(formats=("int3:g32",), bits_per_weight=5),
    "mixture": mixture,
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(6, 32),), dynamic_shapes=({0: TOKENS},))


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(tokens, 32) for tokens in (2, 6, 100)]


def same(got: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_compiling_is_not_exporting() -> None:
    model, x = mixture(), torch.randn(6, 32)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    assert model[1].stats is not None, "compiled mixtures keep their losses"


# torch.export.load of torch 2.10 reads its file into a buffer that cannot be written.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (x in ("low rank", "int8", "int3", "mxfp4")))
        for x in MODELS
    ],
)
def test_export_holds_what_the_model_stores(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    program = exported(model)
    torch.export.save(program, tmp_path / "model.pt2")
    read = torch.export.load(tmp_path / "model.pt2")
    for x in inputs():
        same(read.module()(x), model, x)
    stored = sum(t.nbytes for t in model.state_dict().values())
    held = [*program.state_dict.values(), *program.constants.values()]
    tables = 2 * len(FP4_LEVELS) if name.endswith("fp4") else 0  # one for each layer
    more = sum(t.nbytes for t in held if isinstance(t, Tensor)) - stored
    assert more == tables, "no dense weight in the program"


def test_programs_of_mixtures_drop_tokens_beyond_the_capacity() -> None:
    model, x = mixture(capacity_factor=0.5), inputs()[-1]
    same(exported(model).module()(x), model, x)
    assert int(model[1].stats.dropped) > 0


@pytest.mark.slow
@EACH_MODEL
def test_onnx(name: str) -> None:
    reference = pytest.importorskip("onnx.reference", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = MODELS[name]()
    program = torch.onnx.export(exported(model), (torch.randn(6, 32),), dynamo=True, verbose=False)
    assert program is not None
    run = reference.ReferenceEvaluator(program.model_proto)
    (given,) = program.model_proto.graph.input
    for x in inputs():
        same(torch.from_numpy(run.run(None, {given.name: x.numpy()})[0]), model, x)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["int4", "mixture"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for x in inputs():
        same(run(x), model, x)

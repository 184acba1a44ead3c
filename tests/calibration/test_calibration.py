"""Second moments: against sums over single tokens, with padding, sharing, and everything put back."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_models import bert, gpt2, llama, opt, t5_relu
from mixture_models import mixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensornet as tn
from tensornet._util import spaced_places
from tensornet.calibration import cosine_losses, sampled_losses
from tensornet.calibration.batches import token_mask
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.errors import TargetError
from tensornet.nn.targets import LayerSelection, list_weights

calibrating = importlib.import_module("tensornet.calibration.calibrate")
BATCH = {
    "input_ids": torch.tensor([[5, 7, 9, 11, 13], [6, 8, 10, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


class Classifier(nn.Module):
    """Two linear layers on vectors, one called by keyword; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.tanh(self.first(x)))


def class_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def vectors(count: int = 12) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 4), "y": torch.randint(3, (count,))}


def test_moments_are_means_over_single_samples() -> None:
    model, data = Classifier(), vectors()
    batches = ({k: v[i : i + 4] for k, v in data.items()} for i in (0, 4, 8))
    stats = tn.calibrate(model, batches, loss_fn=class_losses)
    inputs, gradients, losses = torch.zeros(6, 6), torch.zeros(3, 3), 0.0
    for x, y in zip(data["x"], data["y"], strict=True):
        hidden = torch.tanh(model.first(x)).detach()
        logits = model.second(hidden).detach().requires_grad_()
        loss = nn.functional.cross_entropy(logits, y)
        (gradient,) = torch.autograd.grad(loss, logits)
        inputs += torch.outer(hidden, hidden) / 12
        gradients += torch.outer(gradient, gradient) / 12
        losses += loss.item() / 12
    torch.testing.assert_close(stats.columns["second"], inputs)
    torch.testing.assert_close(stats.rows["second"], gradients)
    assert stats.loss == pytest.approx(losses)
    assert stats.tokens == 12


def on_the_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its padding before the text, which keeps its positions."""
    ids, mask = (torch.stack([x[0], x[1].roll(2)]) for x in (batch["input_ids"], batch["attention_mask"]))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("build", [gpt2, llama, opt, *(partial(mixture, x) for x in ("mixtral", "gpt_oss"))])
def test_padding_counts_for_nothing(build: object, left: bool) -> None:
    model = build()  # type: ignore[operator]
    padded = tn.calibrate(model, [on_the_left(BATCH) if left else BATCH])
    rows = [
        {"input_ids": BATCH["input_ids"][:1]},
        {"input_ids": BATCH["input_ids"][1:, :3]},
    ]
    alone = tn.calibrate(model, rows)
    assert padded.tokens == alone.tokens == 8
    assert padded.loss == pytest.approx(alone.loss, rel=1e-5)
    for side in ("rows", "columns"):
        assert getattr(padded, side).keys() == getattr(alone, side).keys()
        for name, moment in getattr(alone, side).items():
            if "wpe" not in name:  # one row of positions serves all rows of a batch
                atol = 1e-4 * float(moment.abs().max())
                torch.testing.assert_close(getattr(padded, side)[name], moment, rtol=1e-4, atol=atol)


def test_layers_with_one_input_share_one_moment() -> None:
    stats = tn.calibrate(llama(), [BATCH])
    q, k, v = (stats.columns[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv")
    assert q is k
    assert k is v
    assert q is not stats.columns["model.layers.0.self_attn.o_proj"]
    assert stats.columns["model.layers.0.mlp.gate_proj"] is stats.columns["model.layers.0.mlp.up_proj"]


def test_embedding_counts_tokens_and_sees_gradients() -> None:
    model = llama()
    stats = tn.calibrate(model, [BATCH])
    expected = torch.zeros(model.config.vocab_size)
    expected[torch.tensor([5, 7, 9, 11, 13, 6, 8, 10])] = 1 / 8
    torch.testing.assert_close(stats.rows["model.embed_tokens"], expected)
    assert stats.columns["model.embed_tokens"].shape == (24, 24)


def test_long_sides_keep_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    full = tn.calibrate(model, [BATCH])
    monkeypatch.setattr(calibrating, "FULL_UP_TO", 30)
    short = tn.calibrate(model, [BATCH])
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(short.columns[name], full.columns[name].diagonal())
    torch.testing.assert_close(short.rows[name], full.rows[name])


@pytest.mark.parametrize("make", [gpt2, bert], ids=["answers", "masked words"])
def test_tokens_without_a_label_are_no_padding(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    ids = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ::2] = -100  # no loss in between
    labels[:, 6:] = -100  # nor at the end
    found = tn.calibrate(model, [{"input_ids": ids, "labels": labels}])
    expected = tn.calibrate(
        model, [{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}]
    )
    assert found.tokens == expected.tokens == 32
    for name, moment in expected.columns.items():
        torch.testing.assert_close(found.columns[name], moment)
    for name, moment in expected.rows.items():
        torch.testing.assert_close(found.rows[name], moment)


def test_labels_alone_show_the_padding_of_a_decoder() -> None:
    ids, labels = torch.ones(1, 5), torch.tensor([[1, -100, 2, -100]])
    until_the_last = [[True, True, True, False]]
    for batch in ({"input_ids": ids}, {"input_ids": ids, "decoder_input_ids": labels.clamp_min(0)}):
        assert token_mask({**batch, "labels": labels}, labels.shape).tolist() == until_the_last  # type: ignore[union-attr]
        assert token_mask({**batch, "labels": labels}, torch.Size([1, 5])) is None  # the encoder
    own = {"input_ids": ids, "labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    assert token_mask(own, labels.shape).all()  # type: ignore[union-attr]
    assert token_mask({"input_ids": labels.abs(), "labels": labels}, labels.shape) is None
    assert token_mask({"x": torch.ones(4, 3), "labels": labels[0]}, labels[0].shape) is None  # of classes


@pytest.mark.slow
def test_sampled_labels_give_the_true_fisher_matrix() -> None:
    model = gpt2().eval()
    ids = torch.tensor([[5, 7]])
    probabilities = model(input_ids=ids).logits[0, 0].softmax(0).detach()
    expected = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
    batch = ids.expand(500, 2)
    stats = tn.calibrate(
        model, [batch] * 4, loss_fn=sampled_losses, config=tn.CompressionConfig(target_modules="lm_head")
    )
    found = stats.rows["lm_head"]
    assert float((found - expected).norm() / expected.norm()) < 0.35  # 2,000 draws of 101 classes
    labels = tn.calibrate(model, [batch] * 4, config=tn.CompressionConfig(target_modules="lm_head"))
    assert float((labels.rows["lm_head"] - expected).norm() / expected.norm()) > 1


def test_cosine_losses_predict_the_turning_of_outputs() -> None:
    model = llama().model.eval()
    batch = {"input_ids": torch.randint(1, 90, (64, 6))}
    stats = tn.calibrate(model, [batch] * 6, loss_fn=cosine_losses)
    name = "layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    before = _pooled(model, batch)
    error = 0.1 * torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight += error
    turned = float(1 - nn.functional.cosine_similarity(before, _pooled(model, batch)).mean())
    # Each of the 6 tokens of a row counts alone, so the prediction lacks what they do together.
    predicted = 0.5 * float(torch.trace(stats.rows[name] @ error @ stats.columns[name] @ error.T))
    assert turned / 6 < predicted < turned * 2


@torch.no_grad()
def _pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


def test_the_model_is_left_as_it_was() -> None:
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    tn.calibrate(model, [BATCH])
    assert model.training
    assert not model.transformer.h[0].training
    assert not model.transformer.wte.weight.requires_grad
    assert model.transformer.h[0].mlp.c_fc.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config.use_cache
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_go_when_a_batch_fails() -> None:
    model = gpt2()
    with pytest.raises(TargetError, match=r"100000.*transformer\.wte"):
        tn.calibrate(model, [torch.tensor([[1, 100_000]])])
    with pytest.raises(TargetError, match="index -1"):
        tn.calibrate(model, [torch.tensor([[1, -1]])])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.transformer.h[0].mlp.c_fc.weight.requires_grad


@pytest.mark.parametrize("make", [gpt2, t5_relu], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("labelled", [True, False])
def test_indices_may_be_of_32_bits(make: Callable[[], nn.Module], labelled: bool) -> None:
    model = make()
    ids = BATCH["input_ids"]
    batch = {"input_ids": ids, "labels": ids} if labelled else {"input_ids": ids}
    expected = tn.calibrate(model, [batch])
    found = tn.calibrate(copy.deepcopy(model), [{name: x.int() for name, x in batch.items()}])
    assert found.loss == pytest.approx(expected.loss)


def test_save_and_load_keep_moments_and_sharing(tmp_path: Path) -> None:
    stats = tn.calibrate(llama(), [BATCH], source="five words")
    with pytest.raises(tn.errors.DestinationError, match="cannot be written"):
        stats.save(tmp_path / "no folder" / "stats.safetensors")
    stats.save(tmp_path / "stats.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert (loaded.tokens, loaded.loss, loaded.source) == (stats.tokens, stats.loss, "five words")
    assert loaded.coherence == stats.coherence != {}
    for side in ("rows", "columns"):
        assert getattr(loaded, side).keys() == getattr(stats, side).keys()
        for name, moment in getattr(stats, side).items():
            assert torch.equal(getattr(loaded, side)[name], moment)
    assert loaded.num_bytes == stats.num_bytes


@pytest.mark.parametrize("content", [None, b"", b"not a file of tensors", b"\x10" * 64])
def test_bad_statistics_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "stats.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tn.errors.FormatError, match="Cannot read"):
        CalibrationStats.load(path)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.ones(2, 8, dtype=torch.long), "got Tensor"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.long)}, "got dict"),
        (7, "got int"),
        ([], "got no batches"),
        (["In the beginning"], r"mapping.*str"),
        ([torch.ones(8, dtype=torch.long)], r"got \(8,\)"),
        ([torch.ones(2, 1, dtype=torch.long)], "No token"),
    ],
)
def test_what_is_no_calibration_data(batches: object, message: str) -> None:
    with pytest.raises(tn.errors.TargetError, match=message):
        tn.calibrate(gpt2(), batches)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "got"), [(None, "NoneType"), (3.0, "float"), (torch.ones(2), "a tensor that does not")]
)
def test_a_loss_function_that_gives_no_losses(losses: object, got: str) -> None:
    with pytest.raises(tn.errors.TargetError, match=f"got {got}"):
        tn.calibrate(gpt2(), [BATCH], loss_fn=lambda model, batch: losses)  # type: ignore[arg-type,return-value]


def test_model_without_a_loss_names_what_to_pass() -> None:
    """Outputs with an entry for each row are judged by their distance; a number for them all is not."""

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"total": self.layer(x).sum()}

    with pytest.raises(tn.errors.TargetError, match="loss of your own"):
        tn.calibrate(Total(), [vectors()["x"]])


def test_not_finite_inputs_name_the_layer() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[0] = torch.nan
    with pytest.raises(tn.errors.NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_fc"):
        tn.calibrate(model, [BATCH], config=tn.CompressionConfig(target_modules="*.mlp.*"))


def test_under_inference_mode() -> None:
    """As a caller may wrap everything that trains nothing."""
    model = gpt2()
    expected = tn.calibrate(model, [BATCH])
    with torch.inference_mode():
        stats = tn.calibrate(model, [BATCH])
    assert stats.loss == pytest.approx(expected.loss)
    name = "transformer.h.0.mlp.c_fc"
    torch.testing.assert_close(stats.rows[name], expected.rows[name])


class Repeated(nn.Module):
    """Two layers whose inputs and gradients have known moments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def many(batches: int, rows: int = 1024, spread: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    scales = 1 + spread * torch.randn(batches, generator=generator)
    return [(a * torch.randn(rows, 8, generator=generator), torch.arange(rows) % 4) for a in scales]


@pytest.mark.parametrize(
    ("batches", "options", "read"),
    [
        (many(9, spread=1.0), {}, 9 * 1024),
        (many(20), {}, 16384),
        (many(9), {"tokens": 8000}, 8000),
        (many(2), {"tokens": 8000}, 2048),
        (many(20), {"gradients": False}, 16384),
    ],
)
def test_calibration_reads_as_many_tokens_as_it_needs(
    batches: list[tuple[torch.Tensor, torch.Tensor]], options: dict[str, int], read: int
) -> None:
    stats = tn.calibrate(Repeated(), batches, **options)  # type: ignore[arg-type]
    assert stats.tokens == read
    x = torch.cat([x for x, _ in batches])[:read]
    torch.testing.assert_close(stats.columns["first"], x.T @ x / read, rtol=1e-4, atol=1e-4)


def test_models_with_one_loss_a_row_read_more_tokens() -> None:
    """Rows of 256 tokens: 16,384 tokens have 64 losses; 1,024 losses are 262,144 tokens."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.layer(nn.functional.one_hot(input_ids, 4).float()).mean(1)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(**batch) * torch.randn(len(batch["input_ids"]), 4)).pow(8).sum(1)  # heavy tails

    batches = [{"input_ids": torch.randint(4, (32, 256))} for _ in range(40)]
    assert tn.calibrate(Encoder(), batches, loss_fn=loss).tokens == 1024 * 256
    assert tn.calibrate(Encoder(), batches, loss_fn=loss, gradients=False).tokens == 16384
    assert tn.calibrate(Encoder(), batches, loss_fn=loss, tokens=512).tokens == 512


@pytest.mark.parametrize("size", [2, 97, 2**24 + 3, 2**25, 151_936 * 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_sampled_at_exact_places(size: int, dtype: torch.dtype) -> None:
    """Of a large embedding that is not compressed, too; all its elements share their memory here."""
    exact = [Fraction(k * (size - 1), 3) for k in range(4)]
    torch.set_default_dtype(dtype)
    try:
        model = nn.Module()
        model.register_parameter("table", nn.Parameter(torch.ones(1, dtype=torch.float32).expand(size)))
        assert weight_samples(list_weights(model)) == {"table": (1.0,) * 4}
        assert spaced_places(size, 4) == [math.floor(x + Fraction(1, 2)) for x in exact]
    finally:
        torch.set_default_dtype(torch.float32)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    stats = tn.calibrate(Repeated(), many(1))
    stats.save(tmp_path / "stats")
    loaded = tn.CalibrationStats.load(tmp_path / "stats")
    assert loaded.fingerprint == stats.fingerprint
    config = tn.CompressionConfig(param_ratio=0.8)
    tn.plan(Repeated().bfloat16().float(), config, loaded)  # the same weights, rounded
    other = Repeated()
    nn.init.normal_(other.second.weight)
    with pytest.raises(tn.errors.TargetError, match="another model"):
        tn.plan(other, config, loaded)


class Checkpointed(nn.Module):
    """An embedding, two blocks that may be run again in the backward pass, and a head."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        for block in self.blocks:
            again = self.reentrant
            hidden = block(hidden) if again is None else checkpoint(block, hidden, use_reentrant=again)
        return self.head(hidden)


# PyTorch warns so whenever a model with reentrant checkpointing runs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("config", [None, LayerSelection()], ids=["all", "without_embedding"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_tokens_once(reentrant: bool, config: LayerSelection | None) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (12, 2, 3, 16), generator=generator)
    batches = [(x, y) for x, y in ids]
    expected = tn.calibrate(Checkpointed(None), batches, config=config)
    stats = tn.calibrate(Checkpointed(reentrant), batches, config=config)
    assert stats.tokens == expected.tokens == 12 * 3 * 16
    assert stats.counts == expected.counts
    for side in ("rows", "columns"):
        assert getattr(stats, side).keys() == getattr(expected, side).keys()
        for name, moment in getattr(expected, side).items():
            torch.testing.assert_close(getattr(stats, side)[name], moment)
    assert stats.coherence == pytest.approx(expected.coherence, rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_hugging_face_models(reentrant: bool) -> None:
    model = llama()
    expected = tn.calibrate(model, [BATCH])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    stats = tn.calibrate(model.train(), [BATCH])
    assert model.training
    assert stats.counts == expected.counts
    torch.testing.assert_close(stats.rows, expected.rows)

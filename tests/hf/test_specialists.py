"""Specialists of transformers models: gradient checkpointing, tied heads, dtypes, choice by likelihood."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_hf.peft import SpecialistsConfig
from tensornet_hf.text import load_tokenizer, token_ids

# transformers 5.24 renamed checkpointing, and PEFT uses the old name too.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = torch.arange(30).reshape(3, 10)
NAMES = ("law", "code")


def trunk() -> PreTrainedModel:
    return th.load(th.embedded.gpt2_path()).eval()


def prepared(model: PreTrainedModel, **options: Any) -> th.PretrainedSpecialists:
    torch.manual_seed(0)
    s = th.specialists(model, rank=4, **options)
    for name in NAMES:
        s.add(name)
        randomize(s, name)
    return s


def randomize(s: tm.Specialists, name: str) -> None:
    for core in s.tensors(name).values():
        nn.init.normal_(core, std=0.3)


def logits(s: tm.Specialists, which: Any) -> Tensor:
    with torch.no_grad(), s.use(which):
        return s.model(IDS).logits  # type: ignore[no-any-return]


@contextmanager
def checkpointing(model: Any, reentrant: bool | None) -> Iterator[None]:
    """Recompute activations in the backward pass, or not if `reentrant` is None."""
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    yield


def gradients(s: tm.Specialists, *which: Any) -> dict[str, Tensor]:
    """Gradients of the sum of several losses, with one backward pass outside of all blocks."""
    total = torch.zeros(())
    for k, each in enumerate(which):
        with s.use(each):
            total = total + (k + 1) * s.model(input_ids=IDS, labels=IDS).loss
    total.backward()
    found = {f"{name} {key}": p.grad for name in (None, *NAMES) for key, p in s.tensors(name).items()}
    s.model.zero_grad()
    return {key: grad for key, grad in found.items() if grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "which", [("law",), ("code", {"law": 0.5, "code": 2.0}, ["law", None, "code"])], ids=str
)
def test_gradient_checkpointing_leaves_the_gradients_equal(which: tuple[Any, ...], reentrant: bool) -> None:
    found = {}
    for form in (None, reentrant):
        s = prepared(trunk())
        with checkpointing(s.model, form):
            found[form] = gradients(s, *which)
    assert found[None].keys() == found[reentrant].keys() != set()
    for key, grad in found[None].items():
        torch.testing.assert_close(found[reentrant][key], grad, rtol=1e-4, atol=1e-6)


def test_adapter_names_of_peft_are_known_to_the_recomputation() -> None:
    found = {}
    for form in (None, True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(trunk(), SpecialistsConfig(r=4), adapter_name="law")
        model.add_adapter("code", SpecialistsConfig(r=4))
        s = th.PretrainedSpecialists(model.get_base_model())
        for name in NAMES:
            randomize(s, name)
        model.set_adapter("code")
        with checkpointing(model, form):
            model(input_ids=IDS, labels=IDS, adapter_names=["law", "code", "__base__"]).loss.backward()
        found[form] = {key: p.grad for key, p in s.tensors("code").items()}
    for form in (True, False):
        for key, grad in found[None].items():
            assert grad is not None
            torch.testing.assert_close(found[form][key], grad, rtol=1e-4, atol=1e-6)


def test_a_tied_head_with_specialists_stays_tied() -> None:
    s = prepared(trunk(), target_modules="all")
    model = s.model
    expected = logits(s, "law")
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(logits(s, "law"), expected)
    before = model.transformer.wte
    with pytest.raises(TargetError, match="Resize the embeddings first"):
        model.resize_token_embeddings(len(before.weight) + 8)
    assert model.transformer.wte is before
    assert torch.equal(logits(s, "law"), expected)
    s.detach()
    model.resize_token_embeddings(len(before.weight) + 8, mean_resizing=False)
    # Embeddings can be resized if the head has no specialists.
    prepared(trunk()).model.resize_token_embeddings(len(before.weight) + 8, mean_resizing=False)


@pytest.mark.parametrize("prepare", [th.specialists, tm.specialists])
def test_save_pretrained_is_refused_while_specialists_are_attached(prepare: Any, tmp_path: Path) -> None:
    model = trunk()
    expected = model(IDS).logits
    s = prepare(model, rank=4)
    with pytest.raises(TargetError, match="detach"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    s.detach()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(th.load(tmp_path / "model").eval()(IDS).logits, expected)


def test_cores_of_a_bfloat16_trunk_are_float32(tmp_path: Path) -> None:
    s = prepared(trunk().bfloat16())
    assert {p.dtype for name in (None, *NAMES) for p in s.tensors(name).values()} == {torch.float32}
    assert s.bytes()["next"] == s.bytes()["law"] == sum(p.nbytes for p in s.tensors("law").values())
    back = th.load_specialists(s.save(tmp_path / "s"), trunk().bfloat16())
    assert torch.equal(logits(back, "law"), logits(s, "law"))
    adapted = peft.get_peft_model(trunk().bfloat16(), SpecialistsConfig(r=4))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    # Smaller steps than bfloat16 can represent are not lost.
    core = next(iter(s.tensors("law").values()))
    before = core.detach().clone()
    optimizer = torch.optim.SGD([core], lr=1e-5)
    with s.use("law"):
        s.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(core, before)
    # A model that is cast as a whole keeps working, also with a new specialist.
    s.model.bfloat16()
    s.add("perl")
    randomize(s, "perl")
    assert logits(s, ["law", "perl", None]).isfinite().all()


def test_a_model_with_other_adapters_is_refused(tmp_path: Path) -> None:
    folder = prepared(trunk()).save(tmp_path / "s")
    adapted = peft.get_peft_model(trunk(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model = adapted.get_base_model()
    for prepare in (
        th.specialists,
        tm.specialists,
        lambda x: th.load_specialists(folder, x, check_trunk=False),
    ):
        with pytest.raises(TargetError, match="Other adapters"):
            prepare(model)
    th.specialists(adapted.unload())


TEXTS = {
    "law": th.embedded.heldout_text()[:1_500].upper(),
    "code": "".join(f"def f{k}(x, y={k}): return [x * {k % 7} + y for _ in range({k})]\n" for k in range(30)),
}


def windows(text: str) -> Tensor:
    ids = token_ids(load_tokenizer(th.embedded.gpt2_path()), text)
    return ids[: len(ids) // 32 * 32].reshape(-1, 32)


def test_the_most_likely_specialist_or_none_is_chosen() -> None:
    s = prepared(trunk(), target_modules="*.mlp.*")
    optimizer = torch.optim.AdamW(s.parameters(), lr=2e-2)
    for name in NAMES:
        for core in s.tensors(name).values():
            nn.init.zeros_(core)
    for step in range(12):
        name = NAMES[step % 2]
        ids = windows(TEXTS[name])[:4]
        with s.use(name):
            s.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scripture = windows(th.embedded.calibration_text()[:1_000])  # what the trunk was trained on
    ids = torch.stack([*(windows(TEXTS[name])[k] for name in NAMES for k in (9, 10)), *scripture[:2]])
    mask = torch.ones_like(ids)
    mask[1, 16:] = mask[2, :12] = 0
    ids = torch.where(mask.bool(), ids, ids.roll(2, 0))  # padding of another domain, on either side
    losses = {}
    for name in (None, *NAMES):
        with s.use(name), torch.no_grad():
            losses[name] = [
                float(s.model(input_ids=x[m.bool()][None], labels=x[m.bool()][None]).loss)
                for x, m in zip(ids, mask, strict=True)
            ]
    found = s.choose(input_ids=ids, attention_mask=mask)
    assert found == [min(losses, key=lambda name: losses[name][row]) for row in range(6)]
    assert found == ["law", "law", "code", "code", None, None]
    with s.use(found):
        s.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(TargetError, match="fewer than two tokens"):
        s.choose(input_ids=ids, attention_mask=mask * (torch.arange(32) < 1))
    s.add("new")  # equal to the trunk, which is preferred
    assert "new" not in s.choose(input_ids=ids)

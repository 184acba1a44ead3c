"""Specialists are chosen by a router, for a text or for each token, or by the likelihood of a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import ShapeError, TargetError
from tensornet_hf.text import load_tokenizer, token_ids

TEXTS = {
    "verse": th.embedded.heldout_text()[:30_000],
    "code": "".join(
        f"def f{k}(x, y={k}): return [x * {k % 7} + y for _ in range({k})]\n" for k in range(500)
    ),
    "sums": "".join(f"{k} + {k * k % 91} = {k + k * k % 91}; " for k in range(1500)),
}


def windows(name: str) -> Tensor:
    ids = token_ids(load_tokenizer(th.embedded.gpt2_path()), TEXTS[name])
    return ids[: len(ids) // 32 * 32].reshape(-1, 32)[:60]


def loaders(*names: str) -> dict[str, list[dict[str, Tensor]]]:
    return {name: [{"input_ids": x} for x in windows(name)[:40].split(8)] for name in names or TEXTS}


@pytest.fixture
def s() -> th.Specialists:
    made = th.specialists(th.load(th.embedded.gpt2_path()).eval(), rank=4)
    for name in TEXTS:
        made.add(name)
        for core in made.tensors(name).values():
            torch.nn.init.normal_(core, std=0.3)
    return made


@torch.no_grad()
def logits(s: th.Specialists, ids: Tensor, which: Any) -> Tensor:
    with s.use(which):
        return s.model(input_ids=ids).logits  # type: ignore[no-any-return]


def test_a_text_gets_the_specialist_of_its_domain(s: th.Specialists, tmp_path: Path) -> None:
    accuracy = s.fit_router(loaders(), prefix=16)
    assert accuracy.keys() == TEXTS.keys()
    assert min(accuracy.values()) >= 0.9
    names = list(TEXTS)
    ids = torch.stack([windows(name)[50] for name in names])
    weights = s.route(input_ids=ids)
    assert {name: w.tolist() for name, w in weights.items()} == {
        name: [float(k == row) for row in range(3)] for k, name in enumerate(names)
    }
    torch.testing.assert_close(logits(s, ids, weights), logits(s, ids, names), rtol=1e-4, atol=1e-4)
    # Only the prefix decides, and padding does not.
    longer = torch.cat([ids[:, :16], ids.roll(1, 0)], 1)
    assert all(torch.equal(w, weights[name]) for name, w in s.route(input_ids=longer).items())
    padded = torch.cat([ids[:, :12], torch.zeros(3, 8, dtype=torch.long)], 1)
    mask = torch.arange(20).expand(3, 20) < 12
    short = s.router(*s._features({"input_ids": ids[:, :12]}, None))  # type: ignore[misc]
    for name, w in s.route(input_ids=padded, attention_mask=mask.long()).items():
        assert torch.equal(w, short[name])
    # Padding on the left, as for generation, does not count either.
    left = {"input_ids": padded.roll(8, 1), "attention_mask": mask.long().roll(8, 1)}
    pooled = s.router.pooled  # type: ignore[union-attr]
    torch.testing.assert_close(
        pooled(*s._features(left, 16)), pooled(*s._features({"input_ids": ids[:, :12]}, 16))
    )
    with s.use(weights):
        s.model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0)
    # Saving and loading keeps the choices; a removed specialist is chosen no longer.
    back = th.load_specialists(s.save(tmp_path / "s"))
    assert all(torch.equal(w, weights[name]) for name, w in back.route(input_ids=ids).items())
    assert th.load_specialists(tmp_path / "s", names=["code"]).router is None
    back.remove("verse")
    assert back.route(input_ids=ids)["code"].tolist()[1:] == [1.0, 0.0]
    assert back.route(input_ids=ids).keys() == {"code", "sums"}
    back.add("new")  # the router does not know it
    assert back.route(input_ids=ids).keys() == {"code", "sums"}


def test_each_token_gets_its_own_specialists(s: th.Specialists) -> None:
    s.fit_router(loaders(), scope="token", top_k=2)
    ids = torch.cat([windows("verse")[50, :16], windows("sums")[50, :16]])[None]
    weights = s.route(input_ids=ids)
    torch.testing.assert_close(sum(weights.values()), torch.ones(1, 32))
    assert int(sum((w > 0).sum() for w in weights.values())) == 2 * 32
    lead = (weights["verse"] - weights["sums"])[0]
    assert float(lead[:16].mean()) > 0.3
    assert float(lead[20:].mean()) < -0.3
    # No token depends on later ones.
    start = s.route(input_ids=ids[:, :16])
    for name, w in start.items():
        torch.testing.assert_close(w, weights[name][:, :16], rtol=1e-4, atol=1e-4)
    logits(s, ids, weights)


def test_the_most_likely_specialist_is_chosen(s: th.Specialists) -> None:
    ids = torch.stack([windows(name)[k] for name in TEXTS for k in (3, 50)])
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[2, :24] = 0
    ids = torch.where(mask.bool(), ids, ids.roll(2, 0))  # padding of another domain
    losses = {}
    for name in TEXTS:
        with s.use(name), torch.no_grad():
            losses[name] = [
                float(s.model(input_ids=x[m.bool()][None], labels=x[m.bool()][None]).loss)
                for x, m in zip(ids, mask, strict=True)
            ]
    best = [min(TEXTS, key=lambda name: losses[name][row]) for row in range(6)]
    assert len(set(best)) > 1
    found = s.route(input_ids=ids, attention_mask=mask)
    assert found == {name: found[name] for name in TEXTS}
    assert {name: w.tolist() for name, w in found.items()} == {
        name: [float(name == x) for x in best] for name in TEXTS
    }
    # A router is preferred, but only the likelihood also compares specialists that were added later.
    s.fit_router(loaders("verse", "code"))
    assert s.route(input_ids=ids).keys() == {"verse", "code"}
    assert s.route(input_ids=ids, by="likelihood").keys() == TEXTS.keys()
    with pytest.raises(ValueError, match="'mode'"):
        s.route(input_ids=ids, by="mode")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="fewer than two tokens"):
        s.route(input_ids=ids, attention_mask=mask * (torch.arange(32) < 1), by="likelihood")


def test_bad_input_keeps_the_earlier_router(s: th.Specialists) -> None:
    with pytest.raises(TargetError, match="no router"):
        s.route(input_ids=windows("code"), by="router")
    s.fit_router(loaders("verse", "code"))
    router = s.router
    with pytest.raises(TargetError, match="no specialist named 'law'"):
        s.fit_router({**loaders("code"), "law": loaders("verse")["verse"]})
    with pytest.raises(TargetError, match="at least two"):
        s.fit_router(loaders("code"))
    with pytest.raises(TargetError, match="Too little text for sums"):
        s.fit_router({**loaders("code"), "sums": [{"input_ids": windows("sums")[:3]}]})
    with pytest.raises(TargetError, match="has no batch"):
        s.fit_router({**loaders("code"), "sums": []})
    for options in ({"scope": "layer"}, {"top_k": 3}, {"prefix": 0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            s.fit_router(loaders("verse", "code"), **options)
    assert s.router is router
    s.detach()
    assert not any("specialist" in name for name in s.model.state_dict())


def test_a_text_may_differ_only_in_how_much_its_features_vary() -> None:
    torch.manual_seed(0)
    texts = {"calm": 0.1 * torch.randn(100, 40, 3), "wild": torch.randn(100, 40, 3)}
    router = tm.SpecialistRouter(list(texts), 3)
    mask = torch.arange(40) < torch.randint(5, 40, (100, 1))
    assert min(router.fit({name: router.pooled(x, mask) for name, x in texts.items()}).values()) > 0.9
    seen = router.pooled(texts["wild"], mask)
    for row in range(100):
        x = texts["wild"][row][mask[row]]
        torch.testing.assert_close(seen[row], torch.cat([x.mean(0), x.std(0, correction=0)]))


def test_the_fit_is_a_logistic_regression_that_has_converged() -> None:
    torch.manual_seed(0)
    examples = {"a": torch.randn(40, 2), "b": torch.randn(40, 2) + 1.0}
    router = tm.SpecialistRouter(list(examples), 2, scope="token")
    router.fit(examples, weight_decay=0.1)
    weight = router.router.weight.clone().requires_grad_()
    # The fit uses four fifths of the examples, in the order of a generator with seed 0.
    generator, parts = torch.Generator().manual_seed(0), []
    for x in examples.values():
        parts.append(x[torch.randperm(40, generator=generator)[8:]])
    x = (torch.cat(parts) - router.mean) / router.scale
    loss = 0.05 * weight[:, :2].square().sum()
    for k, own in enumerate(x.split(32)):
        logits = own @ weight[:, :2].T + weight[:, 2]
        loss = loss - logits.log_softmax(1)[:, k].mean() / 2
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-4


def test_the_fit_balances_a_small_domain() -> None:
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    examples = {"large": centers[0] + torch.randn(2000, 2), "small": centers[1] + torch.randn(40, 2)}
    router = tm.SpecialistRouter(["large", "small"], 2, scope="token")
    assert min(router.fit(examples).values()) > 0.7
    with pytest.raises(TargetError, match="Examples are of"):
        router.fit({"large": examples["large"]})
    with pytest.raises(ShapeError, match="rows, tokens, features"):
        router(torch.randn(3, 2))

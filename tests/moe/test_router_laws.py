"""The built-in routers keep the laws, and each law is broken once by a router made for it."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from page_blocks import python_blocks
from torch import Tensor

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.nn import module as nn_module
from tensornet_moe import routers
from tensornet_moe.testing import RouterLaws

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "extend.md"


class TestSwitch(RouterLaws):
    def router(self, num_features: int, num_experts: int) -> tm.Router:
        return tm.SwitchRouter(num_features, num_experts)


class TestTop2(RouterLaws):
    def router(self, num_features: int, num_experts: int) -> tm.Router:
        return tm.TopKRouter(num_features, num_experts, top_k=2)


class TestNormalizedWithBias(RouterLaws):
    def router(self, num_features: int, num_experts: int) -> tm.Router:
        made = tm.TopKRouter(num_features, num_experts, top_k=2, normalize=True, bias_rate=0.01)
        made.bias_steps += torch.arange(num_experts)
        return made


class TestExpertChoice(RouterLaws):
    test_causal = None  # type: ignore[assignment]  # it looks at the whole batch, and says so

    def router(self, num_features: int, num_experts: int) -> tm.Router:
        return tm.ExpertChoiceRouter(num_features, num_experts, capacity_factor=1.5)


class Sharp(tm.SwitchRouter):
    """One of a user's own, with an argument of its own."""

    options = ("temperature",)

    def __init__(
        self, num_features: int, num_experts: int, *, temperature: float = 0.5, **options: Any
    ) -> None:
        super().__init__(num_features, num_experts, **options)
        self.temperature = temperature

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> tm.Routing:
        return super().select(logits, (logits / self.temperature).softmax(-1), mask)


tm.register_router("sharp", Sharp)


class TestSharp(RouterLaws):
    def router(self, num_features: int, num_experts: int) -> tm.Router:
        return Sharp(num_features, num_experts, temperature=0.25)


class Hash(tm.Router):
    """Send each token to an expert by a hash of its values; nothing is trained."""

    def __init__(self, num_features: int, num_experts: int, **options: Any) -> None:
        super().__init__(num_features, num_experts, **options)
        self.weight.requires_grad_(False)

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> tm.Routing:
        expert = (logits[:, :1] * 1000).round().long() % self.num_experts
        return tm.Routing(expert, torch.ones_like(probs[:, :1]), probs, logits, mask)


tm.register_router("by_hash", Hash)


class TestHash(RouterLaws):
    def router(self, num_features: int, num_experts: int) -> tm.Router:
        return Hash(num_features, num_experts)


class TestDocstring(RouterLaws):
    """The example of `Router`."""

    @property
    def code(self) -> str:
        return "".join(x.source for x in doctest.DocTestParser().get_examples(tm.Router.__doc__ or ""))

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the code, and take its name for this test only: other tests run it as well."""
        for module, name in ((routers, "_ROUTERS"), (nn_module, "_BUILDERS")):
            monkeypatch.setattr(module, name, getattr(module, name).copy())
        self.names: dict[str, Any] = {"torch": torch, "tn": tn, "tm": tm}
        exec(self.code, self.names)

    def router(self, num_features: int, num_experts: int) -> tm.Router:
        (kind,) = [x for x in self.names.values() if isinstance(x, type) and issubclass(x, tm.Router)]
        made = kind(num_features, num_experts)
        assert isinstance(made, tm.Router)
        return made


class TestGuide(TestDocstring):
    """The router of docs/guides/extend.md."""

    @property
    def code(self) -> str:
        (code,) = [block.code for block in python_blocks(GUIDE) if "(tm.Router)" in block.code]
        return code


def test_a_registered_router_is_upcycled_saved_and_loaded(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].dense
    th.upcycle(model, experts=3, router="sharp")
    th.save(model, tmp_path / "m")
    again = th.load(tmp_path / "m")
    routers = [module for module in again.modules() if isinstance(module, Sharp)]
    assert len(routers) == 2
    found, expected = (logits(x, ARCHITECTURES["gpt2"]) for x in (again, model.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_unregistered_router_says_how_to_be_saved() -> None:
    with pytest.raises(TypeError, match=r"_Unnamed.*register_router"):
        _Unnamed(4, 3).spec()


def test_only_routers_are_registered() -> None:
    for other in (object, Sharp(4, 3)):
        with pytest.raises(TypeError, match="subclass of Router"):
            tm.register_router("other", other)  # type: ignore[arg-type]


def test_a_taken_name_is_refused() -> None:
    tm.register_router("sharp", Sharp)  # again is no harm
    with pytest.raises(ValueError, match="'switch' is already"):
        tm.register_router("switch", Sharp)


Select = Callable[[tm.Routing], tm.Routing]


class _Bent(tm.SwitchRouter):
    """Switch, with its decision bent before it is returned."""

    bend: Select

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> tm.Routing:
        return self.bend(super().select(logits, probs, mask))


def _beyond_the_last(r: tm.Routing) -> tm.Routing:
    return replace(r, expert_indices=r.expert_indices + r.num_experts)


def _twice(r: tm.Routing) -> tm.Routing:
    return replace(r, expert_indices=r.expert_indices.repeat(1, 2), weights=r.weights.repeat(1, 2) / 2)


def _half(r: tm.Routing) -> tm.Routing:
    return replace(r, weights=r.weights / 2)


def _detached(r: tm.Routing) -> tm.Routing:
    return replace(r, weights=r.weights.detach())


def _by_place(r: tm.Routing) -> tm.Routing:
    """Round robin: depends on how many tokens came before, padding included."""
    return replace(r, expert_indices=torch.arange(len(r.expert_indices))[:, None] % r.num_experts)


def _by_the_batch(r: tm.Routing) -> tm.Routing:
    """Weights depend on the most certain choice in the batch, padding included."""
    return replace(r, weights=r.weights * r.probs.max())


def _by_the_count(r: tm.Routing) -> tm.Routing:
    """The expert depends on how many tokens there are, so also on later ones."""
    return replace(r, expert_indices=torch.full_like(r.expert_indices, len(r.probs) % r.num_experts))


def _at_random(r: tm.Routing) -> tm.Routing:
    return replace(r, expert_indices=torch.randint(r.num_experts, r.expert_indices.shape))


@pytest.mark.parametrize(
    ("bend", "law"),
    [
        (_beyond_the_last, lambda laws: laws.test_shapes(13)),
        (_twice, lambda laws: laws.test_no_expert_twice()),
        (_half, lambda laws: laws.test_equal_experts_act_as_one()),
        (_detached, lambda laws: laws.test_trains()),
        (_by_place, lambda laws: laws.test_padding_decides_nothing()),
        (_by_the_batch, lambda laws: laws.test_padding_decides_nothing()),
        (_by_the_count, lambda laws: laws.test_causal()),
        (_at_random, lambda laws: laws.test_deterministic_in_eval()),
        (_by_place, lambda laws: laws.test_biases_move_the_load()),
    ],
)
def test_a_bent_router_breaks_its_law(bend: Select, law: Callable[[RouterLaws], None]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        law(_laws(type("Bent", (_Bent,), {"bend": staticmethod(bend)})))


class _Careless(tm.SwitchRouter):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tm.Routing:
        logits = torch.nn.functional.linear(x, self.weight)
        return self.select(logits, logits.softmax(-1), mask)


class _Unnamed(tm.SwitchRouter):
    """Registered nowhere."""


class _Forgetful(tm.SwitchRouter):
    """Describes some of its arguments by hand."""

    def spec(self) -> dict[str, Any]:
        return {"type": "forgetful", "num_features": self.num_features, "num_experts": self.num_experts}


tn.nn.register_module_type(
    "forgetful", lambda spec, device, dtype: _Forgetful(spec["num_features"], spec["num_experts"])
)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (_Careless, lambda laws: laws.test_refuses_non_finite(torch.nan)),
        (_Careless, lambda laws: laws.test_float32_whatever_the_model()),
        (_Unnamed, lambda laws: laws.test_survives_a_checkpoint()),
        (_Forgetful, lambda laws: laws.test_survives_a_checkpoint()),
    ],
)
def test_a_careless_router_breaks_its_law(kind: type[tm.Router], law: Callable[[RouterLaws], None]) -> None:
    with pytest.raises((AssertionError, TypeError, pytest.fail.Exception)):
        law(_laws(kind))


def _laws(kind: type[tm.Router]) -> RouterLaws:
    laws = RouterLaws()
    laws.router = kind  # type: ignore[method-assign, assignment]
    return laws

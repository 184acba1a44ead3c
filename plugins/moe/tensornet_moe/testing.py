"""Laws that every router must satisfy, to be subclassed by the tests of a router.

    class TestMine(RouterLaws):
        def router(self, num_features, num_experts):
            return MyRouter(num_features, num_experts)

They need pytest and fail by assertion. Set a law to None if it does not hold, for example
`test_causal = None` for a router that looks at the whole batch.
"""

import pytest
import torch
from torch import Tensor

from tensornet.errors import NonFiniteError
from tensornet.nn import build_module
from tensornet_moe.router_base import Router, Routing

_TOKENS, _FEATURES, _EXPERTS = 13, 6, 4


class RouterLaws:
    """Laws of routers: subclass as `class TestMine(RouterLaws)` and define `router`."""

    def router(self, num_features: int, num_experts: int) -> Router:
        """Build the router under test with its default combine weights."""
        raise NotImplementedError(f"{type(self).__name__} must define router(num_features, num_experts).")

    @pytest.mark.parametrize("tokens", [0, 1, _TOKENS])
    def test_shapes(self, tokens: int) -> None:
        """Check expert indices, normalised probabilities and float32 results for any number of tokens."""
        routing = self._made()(torch.randn(tokens, _FEATURES))
        k = routing.expert_indices.shape[1]
        assert routing.expert_indices.shape == routing.weights.shape == (tokens, k)
        assert routing.probs.shape == routing.logits.shape == (tokens, _EXPERTS)
        assert {routing.weights.dtype, routing.probs.dtype, routing.logits.dtype} == {torch.float32}
        assert not routing.expert_indices.is_floating_point()
        assert bool(((routing.expert_indices >= 0) & (routing.expert_indices < _EXPERTS)).all())
        assert torch.allclose(routing.probs.sum(-1), torch.ones(tokens), atol=1e-5)
        assert int(routing.load().sum()) <= tokens * k

    def test_no_expert_twice(self) -> None:
        """Check that a token names each expert at most once; duplicates would count its weight twice."""
        indices = self._made()(torch.randn(_TOKENS, _FEATURES)).expert_indices
        assert all(len(set(row)) == len(row) for row in indices.tolist())

    def test_equal_experts_act_as_one(self) -> None:
        """Check that combine weights sum to one, so that upcycled experts reproduce the dense model."""
        routing = self._made()(torch.randn(_TOKENS, _FEATURES))
        sums, reached = _weights(routing).sum(-1), _reached(routing)
        assert bool(reached.any())
        assert torch.allclose(sums[reached], torch.ones(int(reached.sum())), atol=1e-5)

    def test_trains(self) -> None:
        """Check that the combine weights have a gradient with respect to the router weight."""
        router = self._made()
        routing = router(torch.randn(_TOKENS, _FEATURES))
        (_weights(routing) * torch.randn(routing.weights.shape)).sum().backward()
        assert router.weight.grad is not None
        assert float(router.weight.grad.norm()) > 0

    def test_padding_decides_nothing(self) -> None:
        """Check that padding, whatever its values, changes no routing of real tokens."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        mask = torch.arange(_TOKENS) % 3 != 1
        padded = x.masked_fill(~mask[:, None], 1e4)
        alone, masked = router(x[mask]), router(padded, mask)
        assert torch.equal(_dense(masked)[mask], _dense(alone))
        assert torch.equal(masked.load(), alone.load())
        assert int(masked.dropped()) == int(alone.dropped())

    def test_causal(self) -> None:
        """Check that routing ignores later tokens, so that decoding with a cache equals decoding without."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        whole = _dense(router(x))
        for seen in range(1, _TOKENS):
            assert torch.allclose(_dense(router(x[:seen])), whole[:seen], atol=1e-6)

    def test_deterministic_in_eval(self) -> None:
        """Check that equal tokens get equal experts in eval mode."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        assert torch.equal(_dense(router(x)), _dense(router(x)))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_refuses_non_finite(self, value: float) -> None:
        """Check that NaN and infinity raise NonFiniteError in tokens and are ignored in padding."""
        router, x = self._made(), torch.randn(_TOKENS, _FEATURES)
        x[3] = value
        with pytest.raises(NonFiniteError):
            router(x)
        router(x, torch.arange(_TOKENS) != 3)

    def test_float32_whatever_the_model(self) -> None:
        """Check that logits are float32 in half precision and unchanged under autocast."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        exact = router(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x).logits, exact)
        assert router.bfloat16()(x.bfloat16()).logits.dtype == torch.float32

    def test_survives_a_checkpoint(self) -> None:
        """Check that `spec` and the state dict rebuild the router, which needs `register_router`."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        again = build_module(router.spec(), device=None, dtype=None)
        assert type(again) is type(router)
        again.load_state_dict(router.state_dict())
        assert torch.equal(_dense(again.eval()(x)), _dense(router(x)))

    def _made(self) -> Router:
        torch.manual_seed(0)
        return self.router(_FEATURES, _EXPERTS)


def _weights(routing: Routing) -> Tensor:
    return routing.weights if routing.kept is None else routing.weights * routing.kept


def _reached(routing: Routing) -> Tensor:
    real = torch.ones_like(routing.weights, dtype=torch.bool) if routing.kept is None else routing.kept
    return real.any(-1)


def _dense(routing: Routing) -> Tensor:
    """Scatter combine weights to a dense tensor, shape `(tokens, E)`."""
    return torch.zeros_like(routing.probs).scatter_add(1, routing.expert_indices, _weights(routing))

"""Laws that every router and every expert bank must satisfy; subclass them in your tests.

    class TestMine(RouterLaws):
        def router(self, num_features, num_experts):
            return MyRouter(num_features, num_experts)

The classes need pytest (extra `testing`). Set a law to None if it does not apply, for example
`test_causal = None` for a router that uses the whole batch.
"""

import copy
import json

import torch
from torch import Tensor

from tensornet._util import require
from tensornet.errors import NonFiniteError
from tensornet.nn import build_module
from tensornet_moe.bank import ExpertBank
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import group_rows
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.mask import GradientMask
from tensornet_moe.routers import Router, Routing

require(("pytest",), extra="testing", user="tensornet_moe.testing")

import pytest  # noqa: E402 - `require` must run before

_TOKENS, _FEATURES, _EXPERTS = 13, 6, 4

#: Allowed difference of combine weights, in float32. Matrix products of different batch sizes are rounded
#: differently.
_ROUNDING = 100 * torch.finfo(torch.float32).eps


class RouterLaws:
    """Laws of routers: subclass as `class TestMine(RouterLaws)` and define `router`."""

    def router(self, num_features: int, num_experts: int) -> Router:
        """Build the router under test with its default combine weights."""
        raise NotImplementedError(f"{type(self).__name__} must define router(num_features, num_experts).")

    @pytest.mark.parametrize("tokens", [0, 1, _TOKENS])
    def test_shapes(self, tokens: int) -> None:
        """Check shapes, dtypes, expert indices and normalized probabilities for several token counts."""
        routing = self._made()(torch.randn(tokens, _FEATURES))
        k = routing.expert_indices.shape[1]
        assert routing.expert_indices.shape == routing.weights.shape == (tokens, k)
        assert routing.probs.shape == routing.logits.shape == (tokens, _EXPERTS)
        assert {routing.weights.dtype, routing.probs.dtype, routing.logits.dtype} == {torch.float32}
        assert not routing.expert_indices.is_floating_point()
        assert bool(((routing.expert_indices >= 0) & (routing.expert_indices < _EXPERTS)).all())
        assert torch.allclose(routing.probs.sum(-1), torch.ones(tokens), rtol=0, atol=_ROUNDING)
        assert int(routing.load().sum()) <= tokens * k

    def test_no_expert_twice(self) -> None:
        """Check that no token gets the same expert twice, since its weight would then count twice."""
        indices = self._made()(torch.randn(_TOKENS, _FEATURES)).expert_indices
        assert all(len(set(row)) == len(row) for row in indices.tolist())

    def test_equal_experts_act_as_one(self) -> None:
        """Check that the combine weights sum to one, so that upcycled experts reproduce the dense model."""
        routing = self._made()(torch.randn(_TOKENS, _FEATURES))
        sums = _weights(routing).sum(-1)
        computed = torch.ones_like(sums, dtype=torch.bool) if routing.kept is None else routing.kept.any(-1)
        assert bool(computed.any())
        assert torch.allclose(sums[computed], torch.ones(int(computed.sum())), rtol=0, atol=_ROUNDING)

    def test_trains(self) -> None:
        """Check that the combine weights have a gradient with respect to the router weight."""
        router = self._trained()
        routing = router(torch.randn(_TOKENS, _FEATURES))
        (_weights(routing) * torch.randn(routing.weights.shape)).sum().backward()
        assert router.weight.grad is not None
        assert float(router.weight.grad.norm()) > 0

    def test_padding_decides_nothing(self) -> None:
        """Check that the values of padding tokens do not change the routing of real tokens."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        mask = torch.arange(_TOKENS) % 3 != 1
        padded = x.masked_fill(~mask[:, None], 1e4)
        alone, masked = router(x[mask]), router(padded, mask)
        torch.testing.assert_close(_dense(masked)[mask], _dense(alone), rtol=0, atol=_ROUNDING)
        assert torch.equal(masked.load(), alone.load())
        assert int(masked.dropped()) == int(alone.dropped())

    def test_causal(self) -> None:
        """Check that routing ignores later tokens, so that decoding with a cache equals decoding without."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        whole = _dense(router(x))
        for seen in range(1, _TOKENS):
            torch.testing.assert_close(_dense(router(x[:seen])), whole[:seen], rtol=0, atol=_ROUNDING)

    def test_deterministic_in_eval(self) -> None:
        """Check that two calls in eval mode route the same tokens to the same experts."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        assert torch.equal(_dense(router(x)), _dense(router(x)))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_refuses_non_finite(self, value: float) -> None:
        """Check that NonFiniteError is raised for NaN or infinity in tokens, but not in padding."""
        router, x = self._made(), torch.randn(_TOKENS, _FEATURES)
        x[3] = value
        with pytest.raises(NonFiniteError):
            router(x)
        router(x, torch.arange(_TOKENS) != 3)

    def test_float32_whatever_the_model(self) -> None:
        """Check that logits are float32 even in a half-precision router, and do not change under autocast."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        exact = router(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x).logits, exact)
        assert router.bfloat16()(x.bfloat16()).logits.dtype == torch.float32

    def test_balancing_counts_the_choices(self) -> None:
        """Check that the balancing loss counts only the choices marked in `kept`, not all listed experts."""
        router, x = self._made(), torch.randn(_TOKENS, _FEATURES)
        bank = SharedCoreExperts.from_dense(torch.randn(_FEATURES, _FEATURES), num_experts=_EXPERTS)
        moe = SharedCoreMoE(router, ExpertFFN({"up": bank, "down": copy.deepcopy(bank)})).eval()
        moe(x)
        assert moe.stats is not None
        routing = router(x)
        fractions = routing.load() / routing.load().sum()
        want = _EXPERTS * (fractions * routing.probs.mean(0)).sum()
        assert torch.allclose(moe.stats.balance, want, rtol=1e-4)

    def test_biases_move_the_load(self) -> None:
        """Check that biases change an uneven load, which requires `select` to choose experts by `ranked`."""
        router, x = self._trained().eval(), torch.randn(1, _FEATURES).expand(_TOKENS, -1)  # equal tokens
        load = router(x).load()
        if bool((load != load[0]).any()):
            router.bias_rate = 1.0  # larger than any difference of probabilities
            router.bias_steps = (load.float().mean() - load).sign().long()
            assert not torch.equal(router(x).load(), load)

    def test_survives_a_checkpoint(self) -> None:
        """Check that the router and its arguments can be rebuilt from `spec` and the state dict."""
        router, x = self._made().eval(), torch.randn(_TOKENS, _FEATURES)
        router.jitter = 0.25  # not the default, to notice if `spec` omits it
        again = build_module(router.spec(), device=None, dtype=None)
        assert isinstance(again, Router)
        assert type(again) is type(router)
        for name in ("jitter", "combine", *router.options):
            assert getattr(again, name) == getattr(router, name), name
        again.load_state_dict(router.state_dict())
        assert torch.equal(_dense(again.eval()(x)), _dense(router(x)))

    def _made(self) -> Router:
        return self.router(_FEATURES, _EXPERTS)

    def _trained(self) -> Router:
        router = self._made()
        if not any(parameter.requires_grad for parameter in router.parameters()):
            pytest.skip(f"{type(router).__name__} has no trained parameters, so it is not balanced either")
        return router


def _weights(routing: Routing) -> Tensor:
    return routing.weights if routing.kept is None else routing.weights * routing.kept


def _dense(routing: Routing) -> Tensor:
    """Write the combine weights of the computed choices into a dense tensor, shape `(tokens, E)`."""
    return torch.zeros_like(routing.probs).scatter_add(1, routing.expert_indices, _weights(routing))


class BankLaws:
    """Laws of expert banks: subclass as `class TestMine(BankLaws)` and define `bank` and `from_dense`.

    Set `test_starts_as_the_dense_network = None` if a bank cannot be made from a dense matrix.
    """

    #: Shape of the matrices with which the laws are tested.
    shape = (12, 8)

    def bank(self, num_experts: int, shape: tuple[int, int]) -> ExpertBank:
        """Build a new float64 bank whose experts differ."""
        raise NotImplementedError(f"{type(self).__name__} must define bank(num_experts, shape).")

    def from_dense(self, weight: Tensor, num_experts: int) -> ExpertBank:
        """Build a bank whose experts all start as the same dense matrix."""
        raise NotImplementedError(f"{type(self).__name__} must define from_dense(weight, num_experts).")

    def test_matrices(self) -> None:
        """Check shapes, and that selected or repeated experts have the same matrices as in the whole bank."""
        bank = self._made()
        whole = bank.expert_matrices()
        assert whole.shape == (_EXPERTS, *self.shape)
        assert bool(whole.isfinite().all())
        for chosen in ([0], [2, 0], [3, 3, 1]):
            assert torch.allclose(bank.expert_matrices(chosen), whole[chosen])
            assert torch.allclose(bank.expert_matrices(torch.tensor(chosen)), whole[chosen])

    @pytest.mark.parametrize("experts", [[], [_EXPERTS], [-1]])
    def test_refuses_unknown_experts(self, experts: list[int]) -> None:
        """Check that unknown indices, or an empty selection, raise IndexError."""
        with pytest.raises(IndexError, match=r"num_experts|indices"):
            self._made().expert_matrices(experts)

    def test_every_parameter_keeps_a_gradient(self) -> None:
        """Check that all parameters get a gradient, whichever experts are selected."""
        bank = self._made()
        bank.expert_matrices([1]).sum().backward()
        assert [name for name, p in bank.named_parameters() if p.grad is None] == []

    def test_gradients_of_dense_experts(self) -> None:
        """Check outputs and gradients of an `ExpertFFN` against a loop over its dense matrices."""
        up, down = self._made(), self._transposed()
        network = ExpertFFN({"up": up, "down": down}, activation="tanh").double()
        expert = torch.tensor([0, 0, 1, 3, 3, 3])
        x = torch.randn(len(expert), self.shape[1], dtype=torch.float64, requires_grad=True)
        parameters = [x, *dict.fromkeys((*up.stored_tensors(), *down.stored_tensors()))]
        y = network(x, group_rows(expert, _EXPERTS))
        first, second = up.expert_matrices(), down.expert_matrices()
        want = torch.stack(
            [second[e] @ torch.tanh(first[e] @ row) for e, row in zip(expert.tolist(), x, strict=True)]
        )
        assert torch.allclose(y, want)
        found, truth = (torch.autograd.grad(z.square().sum(), parameters) for z in (y, want))
        for mine, dense in zip(found, truth, strict=True):
            assert torch.allclose(mine, dense, atol=1e-9)

    def test_starts_as_the_dense_network(self) -> None:
        """Check that experts of `from_dense` equal the matrix up to `error`, and differ after training."""
        weight = torch.randn(self.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        bank = self.from_dense(weight, _EXPERTS)
        error = getattr(bank, "error", None) or 0.0
        rest = (bank.expert_matrices().detach() - weight).flatten(1).norm(dim=1) / weight.norm()
        assert float(rest.max()) <= error + 1e-6
        _descend(bank, torch.randn(_EXPERTS, *self.shape, dtype=torch.float64))
        first, *others = bank.expert_matrices().detach()
        assert all(float((first - other).norm()) > 1e-3 * float(weight.norm()) for other in others)

    def test_parameters_grow_with_the_experts_alone(self) -> None:
        """Check that each expert adds the same number of parameters, and that shared ones count once."""
        counts = []
        for experts in (2, 3, 5):
            bank = self.bank(experts, self.shape)
            owned = {id(p) for p in bank.parameters()}
            shared = [p for p in bank.shared_parameters().values() if id(p) in owned]
            assert bank.num_params == sum(p.numel() for p in bank.parameters())
            counts.append((experts, bank.num_params - sum(p.numel() for p in shared)))
        assert len({private / experts for experts, private in counts}) == 1

    def test_private_tensors_belong_to_experts(self) -> None:
        """Check that an expert's rows of the private tensors decide about the matrix of this expert alone."""
        bank = self._made()
        before = bank.expert_matrices().detach().clone()
        private, shared = bank.private_tensors(), bank.shared_parameters().values()
        assert not {id(x) for x in private} & {id(x) for x in shared}
        with torch.no_grad():
            for tensor in dict.fromkeys(private):
                assert len(tensor) == _EXPERTS
                tensor[1] += 0.5
        changed = (bank.expert_matrices().detach() != before).flatten(1).any(1)
        assert changed.tolist() == [False, bool(private), *[False] * (_EXPERTS - 2)]

    def test_survives_a_checkpoint(self) -> None:
        """Check that the bank can be rebuilt from the state dict and `spec`, saved as JSON."""
        bank = self._made()
        spec = json.loads(json.dumps(bank.spec()))
        copied = build_module(spec, device=None, dtype=torch.float64)
        copied.load_state_dict(bank.state_dict())
        assert isinstance(copied, ExpertBank)
        assert type(copied) is type(bank)
        assert torch.equal(copied.expert_matrices(), bank.expert_matrices())

    def test_a_mask_leaves_shared_parameters(self) -> None:
        """Check that a mask with `p=1` freezes exactly the shared parameters."""
        bank = self._made()
        shared = bank.shared_parameters()
        if not shared:
            return
        before = {name: p.detach().clone() for name, p in shared.items()}
        known = {id(p) for p in shared.values()}
        others = [p for p in bank.stored_tensors() if id(p) not in known]
        kept = [p.detach().clone() for p in others]
        optimizer = torch.optim.AdamW(dict.fromkeys(bank.stored_tensors()), lr=0.1)
        mask = GradientMask(shared.values(), p=1.0).attach(optimizer)
        bank.expert_matrices().square().sum().backward()
        optimizer.step()
        mask.detach()
        assert all(torch.equal(shared[name], value) for name, value in before.items())
        assert not others or any(not torch.equal(p, old) for p, old in zip(others, kept, strict=True))

    def _made(self) -> ExpertBank:
        return self.bank(_EXPERTS, self.shape)

    def _transposed(self) -> ExpertBank:
        return self.bank(_EXPERTS, (self.shape[1], self.shape[0]))


def _descend(bank: ExpertBank, target: Tensor) -> None:
    """Train a bank for ten steps towards `target`, which has a different matrix for each expert."""
    optimizer = torch.optim.Adam(dict.fromkeys(bank.stored_tensors()), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        (bank.expert_matrices() - target).square().sum().backward()
        optimizer.step()

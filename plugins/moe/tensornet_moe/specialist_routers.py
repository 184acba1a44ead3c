"""Routers that choose specialists from features of the trunk, for a whole text or for each token."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_size
from tensornet.errors import ShapeError, TargetError
from tensornet_moe.bank import check_not_negative
from tensornet_moe.routers import TopKRouter

Scope = Literal["sequence", "token"]
SCOPES = ("sequence", "token")
#: Part of the features of each domain on which the fit is judged.
_HELD_OUT = 5


class SpecialistRouter(nn.Module):
    """Router over named specialists: standardizes features of the trunk, and applies a `TopKRouter` to them.

    The router knows only the domains that it was fitted on. It sends any other text to the most similar of
    these, and never to a specialist that was added later.

    Args:
        names: names of the specialists.
        num_features: number of features of a token.
        scope: `"sequence"`: one choice for each row, from the mean and the standard deviation of each feature
            over its tokens; `"token"`: one choice for each token.
        top_k: number of specialists for each choice; their weights sum to one.
        prefix: number of tokens at the beginning of a text that `scope="sequence"` reads.

    Raises:
        TargetError: fewer than two names.
        ValueError: an unknown `scope`, `top_k` is not between 1 and the number of names, or `prefix` is
            below 1.

    Example:
        >>> router = tm.SpecialistRouter(["law", "code"], 8)
        >>> {name: weights.shape for name, weights in router(torch.randn(3, 5, 8)).items()}
        {'law': torch.Size([3]), 'code': torch.Size([3])}
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        names: Sequence[str],
        num_features: int,
        *,
        scope: Scope = "sequence",
        top_k: int = 1,
        prefix: int = 64,
    ) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"Unknown scope={scope!r}; choose one of {', '.join(SCOPES)}.")
        if len(names) < 2:
            raise TargetError(f"A router chooses between at least two specialists, got {list(names)}.")
        if not 1 <= check_size("top_k", top_k, error=ValueError) <= len(names):
            raise ValueError(f"top_k={top_k} must lie between 1 and {len(names)}, the number of specialists.")
        self.names, self.scope, self.top_k = list(names), scope, top_k
        self.prefix = check_size("prefix", prefix, error=ValueError)
        self.num_features = num_features
        seen = 2 * num_features if scope == "sequence" else num_features
        # A router has no bias, so the last feature is the constant 1.
        self.router = TopKRouter(seen + 1, len(names), top_k=top_k)
        self.register_buffer("mean", torch.zeros(seen))
        self.register_buffer("scale", torch.ones(seen))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Choose specialists for texts.

        Args:
            features: shape `(rows, tokens, features)`.
            mask: shape `(rows, tokens)`, False or 0 for padding.

        Returns:
            Weights for `Specialists.use`, by name, each `(rows,)` or `(rows, tokens)`.
        """
        x = self.pooled(features, mask)
        routing = self.router(self._standardized(x.reshape(-1, x.shape[-1])))
        weights = torch.zeros_like(routing.probs).scatter(1, routing.expert_indices, routing.weights)
        return {name: weights[:, k].reshape(x.shape[:-1]) for k, name in enumerate(self.names)}

    def _standardized(self, x: Tensor) -> Tensor:
        x = (x.float() - self.mean) / self.scale
        return torch.cat([x, x.new_ones(len(x), 1)], 1)

    def pooled(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what the router sees: mean and standard deviation of each row's first features, or all.

        Args:
            features, mask: as for `forward`; rows begin with their first token, so padding is on the right.

        Raises:
            ShapeError: the features do not have three dimensions.
        """
        if features.ndim != 3:
            raise ShapeError(f"Features have shape (rows, tokens, features), got {tuple(features.shape)}.")
        if self.scope == "token":
            return features
        x = features[:, : self.prefix].float()
        kept = x.new_ones(*x.shape[:2], 1) if mask is None else mask[:, : self.prefix, None].to(x)
        count = kept.sum(1).clamp_min(1)
        mean = (x * kept).sum(1) / count
        deviation = ((x - mean[:, None]).square() * kept).sum(1) / count
        return torch.cat([mean, deviation.sqrt()], 1)

    def without(self, name: str) -> "SpecialistRouter | None":
        """Return a router that does not choose `name`; None if fewer than two specialists would be left."""
        kept = [k for k, x in enumerate(self.names) if x != name]
        if len(kept) == len(self.names):
            return self
        if len(kept) < 2:
            return None
        names, top_k = [self.names[k] for k in kept], min(self.top_k, len(kept))
        options = {"scope": self.scope, "top_k": top_k, "prefix": self.prefix}
        made = SpecialistRouter(names, self.num_features, **options)  # type: ignore[arg-type]
        made.to(self.mean.device)
        made.requires_grad_(False)
        with torch.no_grad():
            made.mean.copy_(self.mean)
            made.scale.copy_(self.scale)
            made.router.weight.copy_(self.router.weight[kept])
        return made

    def fit(
        self,
        examples: Mapping[str, Tensor],
        *,
        steps: int = 100,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> dict[str, float]:
        """Fit the router to known domains, by the cross entropy of the domain.

        The fit is a logistic regression. All domains have the same weight, however many examples they have.

        Args:
            examples: what the router sees (`pooled`) of each domain by name, shape `(examples, features)`.
            steps: largest number of steps of L-BFGS with all examples.
            weight_decay: weight of half the squared weights of the router in the loss.
            seed: seed that selects the fifth of the examples on which the fit is judged.

        Returns:
            The share of correct choices for each domain, on examples that were not used for the fit.

        Raises:
            TargetError: the domains are not those of the router, or a domain has fewer than five examples.
            ValueError: an option is out of its range.
        """
        check_size("steps", steps, error=ValueError)
        check_not_negative(weight_decay=weight_decay)
        if set(examples) != set(self.names):
            raise TargetError(f"Examples are of {sorted(examples)}, but the router is for {self.names}.")
        if few := [name for name, x in examples.items() if len(x) < _HELD_OUT]:
            raise TargetError(
                f"Too little text for {', '.join(few)}: a router needs at least {_HELD_OUT} examples of each "
                "domain (rows for scope='sequence', tokens for scope='token')."
            )
        generator = torch.Generator().manual_seed(seed)
        parts: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}  # by "is held out"
        for k, name in enumerate(self.names):
            order = torch.randperm(len(examples[name]), generator=generator)
            cut = len(order) // _HELD_OUT
            for held, index in ((True, order[:cut]), (False, order[cut:])):
                x = examples[name].detach().float().to(self.mean.device)[index.to(self.mean.device)]
                parts[held].append((x, torch.full((len(x),), k, device=x.device)))
        x, labels = (torch.cat(each) for each in zip(*parts[False], strict=True))
        self.mean.copy_(x.mean(0))
        self.scale.copy_(x.std(0).clamp_min(1e-6))
        x = self._standardized(x)
        share = torch.tensor([len(x) / len(own) for own, _ in parts[False]], device=x.device)
        weight = self.router.weight
        nn.init.zeros_(weight)
        optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.router(x).logits, labels, weight=share)
            loss = loss + weight_decay / 2 * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(evaluate)
        self.requires_grad_(False)
        found = {}
        for name, (own, wanted) in zip(self.names, parts[True], strict=True):
            chosen = self.router(self._standardized(own)).logits.argmax(-1)
            found[name] = float((chosen == wanted).float().mean())
        return found

"""A module with nothing left to do."""

from typing import Any

from torch import Tensor, nn

from tensornet.nn import register_module_type


class DoneBefore(nn.Module):
    """Stands where a part of a feed-forward network was that a mixture before it computes now.

    Unlike `nn.Identity` it has a description, so that a saved model is built again with it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready description, see `tensornet.nn.register_module_type`."""
        return {"type": "done_before"}


register_module_type("done_before", lambda spec, device, dtype: DoneBefore())

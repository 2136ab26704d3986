"""What can be seen: a client's mean and covariance."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedtap.simulator.leaks import Leak, Protocol


class MomentsLeak(Leak):
    """Mean and covariance of a client's records, the protocol's `batch` of them: `mean`, `victims features`, and
    `covariance`, `victims features features`."""

    kind = "moments"
    precise = True

    @classmethod
    def architecture(cls, protocol: Protocol, build: Callable[..., nn.Module]) -> nn.Module:
        """There is no model."""
        return nn.Identity()

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Two moments."""
        (features,) = self.protocol.shape
        return {"mean": (features,), "covariance": (features, features)}

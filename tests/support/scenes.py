"""An image scenario for tests of the federation: no question of its own, and no stopwatch.

Expect: rows without an overhead, since tests measure no time.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.federation.settings import ImageObserved
from fedtap.simulator.scenario import Row, Session


@dataclass(frozen=True)
class Scene(ImageScenario):
    """Honest clients and a compromised one."""

    name: str = "test"

    def measured(self, session: Session, observed: ImageObserved) -> Row:
        """No overhead."""
        return {"overhead": None}

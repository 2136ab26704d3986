"""Models by name."""

from __future__ import annotations

import pytest

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.registry import build


@pytest.mark.parametrize("name", ["lenet(depht=2)", "lenet(width=0)", "lenet()", "lenet(3)"])
def test_a_size_that_a_model_does_not_have_is_named(name: str) -> None:
    with pytest.raises(FedtapError, match="no size of lenet that can be built"):
        build(name, (3, 8, 8), 3)

"""Does a photograph come back out of the gradient that a client sends?

Expect: yes. From one image's gradient on an untrained LeNet, iDLG rebuilds it almost to the bit, DLG most of them
without being told the label, and a short Inverting Gradients a blurred likeness; from an MLP's first layer it can
simply be read off. The blind guess beside them shows what would be seen without the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario


@dataclass(frozen=True)
class FirstLeak(ImageScenario):
    """One step of federated SGD on one image, undefended."""

    matching: ClassVar[str] = "idlg,dlg(steps=1200),inverting_gradients(steps=500)"
    victims: int = 6

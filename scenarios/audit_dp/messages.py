"""Messages that are hidden in one unit's update and read back from the release: of private mechanisms, few are."""

from __future__ import annotations

import math

import numpy as np

from fedtap.scenarios.audit_dp.probes import Code, bits_for
from fedtap.simulator.auditing.evidence import Guesses
from fedtap.simulator.scores import lower_limit


class HiddenMessages:
    """Messages in some entries of an update, and how often they were read.

    Args:
        where: of each entry of a release, whether messages are in it.
        direction: the signs of what a message of ones becomes there.
        epsilon, delta: what is promised of one release that the unit takes part in.
        draw: of messages.
    """

    def __init__(
        self, where: np.ndarray, direction: np.ndarray, epsilon: float, delta: float, draw: np.random.Generator
    ) -> None:
        self._where, self._direction, self._draw = where, direction, draw
        self._code = Code(int(where.sum()), bits_for(epsilon, delta), draw)
        self._guesses = Guesses(self._code.chance(epsilon, delta))

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """A message, and by what each entry of the update is multiplied to hold it."""
        message = self._draw.choice([-1.0, 1.0], self._code.bits)
        signs = np.zeros(len(self._where))
        signs[self._where] = self._code.written(message)
        return message, signs

    def read(self, message: np.ndarray, moved: np.ndarray) -> None:
        """Guess the message from a release, of which the mean without the unit was taken away."""
        read = self._code.read(moved[self._where], self._direction)
        self._guesses.add(bool((read == message).all()))

    @property
    def asked(self) -> bool:
        """Whether any message was."""
        return self._guesses.made > 0

    def log_e(self) -> float:
        """Evidence that more messages are read than is promised."""
        return self._guesses.log_e

    def least(self, doubt: float, delta: float) -> float:
        """ε of a release at this δ, at least; 0 for none.

        Args:
            doubt: probability with which it is above the true one, at most.
        """
        low = lower_limit(self._guesses.right, self._guesses.made, doubt) - delta
        return max(math.log(low) + self._code.bits * math.log(2), 0.0) if low > 0 else 0.0

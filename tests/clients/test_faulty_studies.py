"""A study goes on without a client that fails, and says so in its row; where it needs all, it ends in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.scenario import Row, Scenario
from fedtap.simulator.wire.roll import ASKED
from tests.attackers.test_dager import news  # noqa: F401 - a fixture
from tests.support.faulty_clients import FAULTS, Reply
from tests.support.playing import played

STUDIES: dict[str, dict[str, str]] = {
    "attention": {"n": "3", "d": "4", "heads": "2", "victims": "3", "attack": "attention_newton(steps=3)"},
    "fedprox": {"width": "8", "examples": "3", "features": "4", "victims": "3", "attack": "stationary_mmd(rounds=1)"},
    "text_gradients": {"dataset": "news", "width": "48", "batch": "2", "tokens": "6", "victims": "3"},
}

SOME = (
    "raises", "exits", "returns the order", "sends no arrays", "sends NaN", "sends a pickle", "sends one entry less",
    "leaves out an array", "says it is client 0",
)  # fmt: skip


class Faulty(ClientApp):
    """Clients of these settings, of which client 1 spoils its replies."""

    def __init__(self, settings: Sequence[Scenario], fault: str) -> None:
        super().__init__()
        self._sound, self._fault = client_app(lambda config: settings), FAULTS[fault]

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self._sound(message, context)
        if message.metadata.message_type == ASKED or context.node_config["partition-id"] != 1:
            return reply
        return self._fault(Reply(message, reply))  # type: ignore[no-any-return]


def rows_of(name: str, options: dict[str, str], fault: str, root: Path) -> list[Row]:
    settings = plan(name, options)
    return played(settings, root / "out", root, Faulty(settings, fault))


@pytest.mark.parametrize(("number", "fault"), enumerate(SOME))
def test_a_study_goes_on_without_a_client_that_fails(number: int, fault: str, news: Path) -> None:  # noqa: F811
    """Each fault in one of the studies, in turn."""
    name = list(STUDIES)[number % len(STUDIES)]
    rows = rows_of(name, STUDIES[name], fault, news)
    assert [row["client"] for row in rows if not row.get("error")] == [0, 2]
    (lost,) = (row for row in rows if row.get("error"))
    assert lost["client"] == 1
    assert "lient 1 failed" in lost["error"]
    assert len(lost["error"]) < 400
    assert "lient 1 failed" in (news / "out/report.html").read_text()


@pytest.mark.parametrize("fault", ["raises", "sends one entry less", "sends NaN", "renames the ArrayRecord"])
def test_a_study_that_needs_all_clients_ends_in_a_sentence(fault: str, tmp_path: Path) -> None:
    with pytest.raises(FedtapError) as caught:
        rows_of("posterior_shards", {"shards": "3", "samples": "20", "pseudo": "4"}, fault, tmp_path)
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()

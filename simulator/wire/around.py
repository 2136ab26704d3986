"""What a Grid around a Grid hands on as it is: the run, and the making of messages."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class GridAround(Grid):
    """A Grid that says how it sends, and leaves all else to the one that it is around.

    Args:
        grid: the one inside.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """As the wrapped grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the wrapped grid does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

"""Notices that a node will be taken away, such as a spot instance, so that a run saves before.

Ray calls such a node draining: it starts nothing new there. Ray Train has a watcher of its own, but
one more process for each job, and none for trials that run directly in Ray Tune.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.cluster.messages import look_regularly

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray._private.state

ray_state: Any = ray._private.state.state


class NodeNotices:
    """Notices about some nodes."""

    def __init__(self, nodes: Collection[str]) -> None:
        self._nodes = frozenset(nodes)
        self._noticed: frozenset[str] = frozenset()
        self._answered: frozenset[str] = frozenset()

    def look(self) -> None:
        """Ask Ray which of the nodes will be taken away."""
        self._noticed = self._nodes.intersection(ray_state.get_draining_nodes())

    def take(self) -> bool:
        """Return whether there is a notice that was not taken before."""
        new = self._noticed - self._answered
        self._answered |= new
        return bool(new)


@contextmanager
def watch_nodes(nodes: Collection[str]) -> Iterator[NodeNotices]:
    """Look for notices about nodes, by Ray's ids, regularly until the block ends."""
    notices = NodeNotices(nodes)
    with look_regularly(notices.look):
        yield notices


def own_node() -> str:
    """Return Ray's id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())

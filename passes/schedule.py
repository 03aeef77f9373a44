"""The order of a gathered graph: what stands on a site's set comes behind the decision, all else stays where it was."""

import heapq
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from tpcompile.errors import StageError

Step = fx.Node | int
"""A node, or the level of a set: there its site opens."""


def schedule(nodes: Iterable[fx.Node], needs: Mapping[fx.Node, int], opens: Mapping[int, tuple[fx.Node, ...]]) -> list[Step]:
    """The first order, by the nodes' own, in which every set is open before a node needs it.

    Args:
        nodes: in their present order.
        needs: the newest set that a node stands on or reads; 0 where any order does.
        opens: level of a set -> what must be there when it opens, in any order. The last of it, by the present order, says where.

    Raises:
        StageError: there is no such order.
    """
    place: dict[Step, float] = {node: float(i) for i, node in enumerate(nodes)}
    after: dict[Step, set[Step]] = {
        node: {*node.all_input_nodes, *([needs[node]] if needs.get(node) else [])}
        for node in list(place)
        if isinstance(node, fx.Node)
    }
    for level, first in opens.items():
        after[level] = {*first, *([level - 1] if level - 1 in opens else [])}
        place[level] = max(place[node] for node in first) + 0.5
    return list(_in_order(place, after))


def _in_order(place: Mapping[Step, float], after: Mapping[Step, set[Step]]) -> Iterator[Step]:
    readers: dict[Step, list[Step]] = {step: [] for step in place}
    for step, before in after.items():
        for one in before:
            readers[one].append(step)
    missing = {step: len(before) for step, before in after.items()}
    ready = [(place[step], step) for step, count in missing.items() if not count]
    heapq.heapify(ready)
    left = len(place)
    while ready:
        _, step = heapq.heappop(ready)
        left -= 1
        yield step
        for reader in readers[step]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, (place[reader], reader))
    if left:
        raise StageError(
            "a site's decision waits for its own tokens", fix="this is a bug: rerun with --dump-ir DIR and report the dump"
        )

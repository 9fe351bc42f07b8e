"""Links between ranks: how long a message takes, and what it keeps others from using meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BYTES_PER_MS = 1e6  # of one GB/s


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links of a cluster between pipeline ranks. A rank may be several GPUs, whose links work side by side.

    Messages from one rank to another go one after the other, and so do those that leave or enter a node,
    at the speed of its uplink.

    Attributes:
        latency_ms, gb_per_s: between two ranks of a node, one direction.
        ranks_per_node: pipeline ranks in a node; 0 if all are in one.
        node_latency_ms, node_gb_per_s: between two ranks of different nodes.
        uplink_gb_per_s: of a node, for all its ranks together, each direction; 0 if never the limit.
        send_gb_per_s, receive_gb_per_s: at which a rank itself handles a message, packing it or copying it
            into a socket, and computes nothing meanwhile; 0 if others do all of it.
    """

    latency_ms: float
    gb_per_s: float
    ranks_per_node: int = 0
    node_latency_ms: float = 0.0
    node_gb_per_s: float = 0.0
    uplink_gb_per_s: float = 0.0
    send_gb_per_s: float = 0.0
    receive_gb_per_s: float = 0.0

    def __post_init__(self) -> None:
        if self.gb_per_s <= 0:
            raise ValueError(f"the network's gb_per_s must be above 0, not {self.gb_per_s:g}")
        if self.ranks_per_node and self.node_gb_per_s <= 0:
            raise ValueError(
                f"a network of nodes needs node_gb_per_s above 0, not {self.node_gb_per_s:g}; "
                "leave ranks_per_node out if all ranks are in one node"
            )

    def node_of(self, rank: int) -> int:
        """The node of a pipeline rank."""
        return rank // self.ranks_per_node if self.ranks_per_node else 0

    def transfer_ms(self, num_bytes: int, source: int, target: int) -> float:
        """Milliseconds of a message between two ranks whose links are free."""
        if self.node_of(source) == self.node_of(target):
            return self.latency_ms + num_bytes / (self.gb_per_s * BYTES_PER_MS)
        return self.node_latency_ms + num_bytes / (self.node_gb_per_s * BYTES_PER_MS)

    def send_ms(self, num_bytes: int) -> float:
        """Milliseconds that a message takes from its sender's computing, before it leaves."""
        return num_bytes / (self.send_gb_per_s * BYTES_PER_MS) if self.send_gb_per_s else 0.0

    def receive_ms(self, num_bytes: int) -> float:
        """Milliseconds that a message takes from its receiver's computing, after it has arrived."""
        return num_bytes / (self.receive_gb_per_s * BYTES_PER_MS) if self.receive_gb_per_s else 0.0


class Route(NamedTuple):
    """What a message between two ranks needs.

    Attributes:
        total_ms: from its start to its arrival.
        busy_ms: which links it keeps from others, by number, and for how long.
    """

    total_ms: float
    busy_ms: tuple[tuple[int, float], ...] = ()


class Links:
    """The state of a network's links while messages are sent, in the order of the times they are ready."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._numbers: dict[tuple[str, int, int], int] = {}
        self._free_ms: list[float] = []
        self._routes: dict[tuple[int, int, int], Route] = {}

    def route(self, num_bytes: int, source: int, target: int) -> Route:
        """The route of a message between two ranks."""
        key = num_bytes, source, target
        found = self._routes.get(key)
        if found is None:
            found = self._routes[key] = self._new_route(*key)
        return found

    def _new_route(self, num_bytes: int, source: int, target: int) -> Route:
        network = self.network
        nodes = network.node_of(source), network.node_of(target)
        latency_ms = network.latency_ms if nodes[0] == nodes[1] else network.node_latency_ms
        total_ms = network.transfer_ms(num_bytes, source, target)
        busy_ms = {("pair", source, target): total_ms - latency_ms}
        if nodes[0] != nodes[1] and network.uplink_gb_per_s:
            uplink_ms = num_bytes / (network.uplink_gb_per_s * BYTES_PER_MS)
            busy_ms["out of node", nodes[0], 0] = busy_ms["into node", nodes[1], 0] = uplink_ms
        return Route(total_ms, tuple((self._number(link), ms) for link, ms in busy_ms.items()))

    def _number(self, link: tuple[str, int, int]) -> int:
        number = self._numbers.setdefault(link, len(self._numbers))
        if number == len(self._free_ms):
            self._free_ms.append(0.0)
        return number

    def send(self, route: Route, ready_ms: float) -> float:
        """Send a message that is ready at ``ready_ms``; when it has arrived."""
        free_ms, start_ms = self._free_ms, ready_ms
        for link, _ in route.busy_ms:
            if free_ms[link] > start_ms:
                start_ms = free_ms[link]
        for link, duration_ms in route.busy_ms:
            free_ms[link] = start_ms + duration_ms
        return start_ms + route.total_ms


def busiest_link_ms(network: Network, num_bytes: npt.NDArray[np.float64]) -> float:
    """How long the link with most to carry is busy.

    Args:
        network: of the ranks.
        num_bytes: from each rank, a row, to each rank, a column.
    """
    nodes = np.array([network.node_of(rank) for rank in range(len(num_bytes))])
    crosses = nodes[:, None] != nodes[None, :]
    rates = np.where(crosses, network.node_gb_per_s or 1.0, network.gb_per_s) * BYTES_PER_MS
    busiest_ms = float((num_bytes / rates).max())
    if network.uplink_gb_per_s:
        crossing = num_bytes * crosses
        by_node = np.zeros((nodes.max() + 1, 2))
        np.add.at(by_node, nodes, np.stack([crossing.sum(axis=1), crossing.sum(axis=0)], axis=1))
        busiest_ms = max(busiest_ms, float(by_node.max()) / (network.uplink_gb_per_s * BYTES_PER_MS))
    return busiest_ms

"""Links between ranks: how long a message takes, and what it keeps others from using meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

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


class Links:
    """The state of a network's links while messages are sent, in the order of the times they are ready."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._free_ms: dict[tuple[str, int, int], float] = {}

    def send(self, num_bytes: int, source: int, target: int, ready_ms: float) -> float:
        """Send a message that is ready at ``ready_ms``; when it has arrived."""
        network = self.network
        nodes = network.node_of(source), network.node_of(target)
        latency_ms = network.latency_ms if nodes[0] == nodes[1] else network.node_latency_ms
        total_ms = network.transfer_ms(num_bytes, source, target)
        busy_ms = {("pair", source, target): total_ms - latency_ms}
        if nodes[0] != nodes[1] and network.uplink_gb_per_s:
            uplink_ms = num_bytes / (network.uplink_gb_per_s * BYTES_PER_MS)
            busy_ms["out of node", nodes[0], 0] = busy_ms["into node", nodes[1], 0] = uplink_ms
        start_ms = max([ready_ms] + [self._free_ms.get(link, 0.0) for link in busy_ms])
        for link, duration_ms in busy_ms.items():
            self._free_ms[link] = start_ms + duration_ms
        return start_ms + total_ms

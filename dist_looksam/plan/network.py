"""How many bytes a collective puts on the wire, and how long it takes: an alpha-beta model."""

from dataclasses import dataclass
from math import ceil, log2

from .machines import Network

KINDS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True, kw_only=True)
class Call:
    """`times` collectives in which every rank puts `elements` numbers of `size` bytes.

    kind is one of KINDS, with torch's meaning: of an all-gather a rank puts in its own part.
    """

    kind: str
    elements: int
    size: int
    times: int = 1

    @property
    def bytes(self) -> int:
        """What a rank puts in, all times together."""
        return self.elements * self.size * self.times


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How many ranks, and how many of them on a node."""

    total: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.total // self.per_node)

    @property
    def inner(self) -> int:
        """Ranks of one node."""
        return min(self.total, self.per_node)


def wire_bytes(call: Call, ranks: int, *, gloo: bool = False) -> float:
    """Bytes that one rank sends, of all times, without the protocol's own.

    A ring's: 2 (n-1)/n of an all-reduce, (n-1)/n of a reduce-scatter, n-1 parts of an all-gather.
    """
    share = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "reduce_scatter": (2 if gloo else 1) * (ranks - 1) / ranks,
        "all_gather": ranks - 1,
    }
    return call.bytes * share[call.kind]


def seconds(call: Call, ranks: Topology, network: Network) -> float:
    """Of all times. Inside each node first, then between nodes, where a node sends what it holds
    once, over all its cables together."""
    if ranks.total == 1:
        return 0.0
    whole = call.elements * call.size * (ranks.total if call.kind == "all_gather" else 1)
    turns = _turns(call.kind, network.gloo)
    inside, nodes = ranks.inner, ranks.nodes
    latency = network.inner_latency * messages(call.kind, inside, gloo=network.gloo, apart=False)
    moved = turns * whole * (inside - 1) / inside / network.inner_bandwidth
    latency += network.latency * messages(call.kind, nodes, gloo=network.gloo, apart=True)
    moved += turns * whole * (nodes - 1) / nodes / network.bandwidth
    return call.times * (latency + moved)


def messages(kind: str, ranks: int, *, gloo: bool, apart: bool) -> int:
    """Messages that wait for one another in one collective: what a latency counts for.

    A ring's; NCCL's all-reduce goes up and down a tree of nodes. `apart`: each rank stands for
    another node. Calibration divides by the number that a plan multiplies by.
    """
    tree = apart and not gloo and kind == "all_reduce" and ranks > 1
    return _turns(kind, gloo) * (ceil(log2(ranks)) if tree else ranks - 1)


def _turns(kind: str, gloo: bool) -> int:
    """How often data goes round."""
    return {"all_reduce": 2, "reduce_scatter": 2 if gloo else 1, "all_gather": 1}[kind]

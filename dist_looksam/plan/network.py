"""Bytes that a collective sends, and the time it takes in an alpha-beta model."""

from dataclasses import dataclass
from math import ceil, log2

from .machines import Network


@dataclass(frozen=True, kw_only=True)
class Call:
    """`times` collectives whose input on every rank is `elements` numbers of `size` bytes.

    kind: all_reduce, reduce_scatter or all_gather, whose input is the rank's own part.
    ranks: neighbours that take part; None: all. apart: so many, each in another block of ranks.
    """

    kind: str
    elements: int
    size: int
    times: int = 1
    ranks: int | None = None
    apart: bool = False

    def whole(self, ranks: int) -> int:
        """Bytes of the whole tensor of one collective over `ranks`."""
        return self.elements * self.size * (ranks if self.kind == "all_gather" else 1)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The number of ranks, and of ranks on a node."""

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
    """Bytes that one rank sends in a ring, all `times` together, without protocol overhead.

    2 (n-1)/n of an all-reduce's tensor, (n-1)/n of a reduce-scatter's or an all-gather's.
    """
    ranks = call.ranks or ranks
    return call.times * _turns(call.kind, gloo) * call.whole(ranks) * (ranks - 1) / ranks


def seconds(call: Call, ranks: Topology, network: Network) -> float:
    """Seconds, all `times` together: first inside each node, then between nodes, where a node sends
    its data once, over all its cables together."""
    if call.ranks:
        near = max(1, ranks.per_node * call.ranks // ranks.total) if call.apart else ranks.per_node
        ranks = Topology(total=call.ranks, per_node=min(near, call.ranks))
    if ranks.total == 1:
        return 0.0
    whole, turns = call.whole(ranks.total), _turns(call.kind, network.gloo)
    inside, nodes = ranks.inner, ranks.nodes
    latency = network.inner_latency * messages(call.kind, inside, gloo=network.gloo, apart=False)
    moved = turns * whole * (inside - 1) / inside / network.inner_bandwidth
    latency += network.latency * messages(call.kind, nodes, gloo=network.gloo, apart=True)
    moved += turns * whole * (nodes - 1) / nodes / network.bandwidth
    return call.times * (latency + moved)


def messages(kind: str, ranks: int, *, gloo: bool, apart: bool) -> int:
    """Consecutive messages of one collective, each of which costs one latency.

    A ring's; NCCL's all-reduce goes up and down a tree of nodes. `apart`: each rank is on another
    node. Calibration divides by this number, a plan multiplies by it.
    """
    tree = apart and not gloo and kind == "all_reduce" and ranks > 1
    return _turns(kind, gloo) * (ceil(log2(ranks)) if tree else ranks - 1)


def _turns(kind: str, gloo: bool) -> int:
    """How often the tensor goes around the ring."""
    return {"all_reduce": 2, "reduce_scatter": 2 if gloo else 1, "all_gather": 1}[kind]

"""A group of ranks on the nodes of a cluster, and how long it takes to send.

Ranks are laid out as in parallel/layout.py (tp fastest, then cp, dp, pp), so a group of ranks stays
inside a node while the product of its size and of the faster ones does. A collective over g members
of each node takes their g network cards together; inside a node it takes the node's own links.
"""

import math
from dataclasses import dataclass

from pretrain.planner.hardware import Hardware


@dataclass(frozen=True)
class RankGroup:
    """Describes a group of `size` ranks, each `stride` ranks after the one before."""

    size: int
    stride: int

    def members_per_node(self, hardware: Hardware) -> int:
        """Return how many ranks of the group a node holds."""
        return min(self.size, max(1, hardware.devices_per_node // self.stride))

    def ring_seconds(
        self, sent_bytes: float, hardware: Hardware, share: float | None = None
    ) -> float:
        """Estimate one all-gather, reduce-scatter or all-reduce.

        Args:
            sent_bytes: by each rank.
            share: of the link's bytes per second that it reaches; None = that of `links`.
        """
        if self.size == 1:
            return 0.0
        inside = self.members_per_node(hardware)
        rate = math.inf
        if inside > 1:
            rate = hardware.rate_inside_node(inside - 1)
        if inside < self.size:
            rate = min(rate, inside * hardware.network_bytes_per_second)
        rate *= share or hardware.efficiency.links
        return sent_bytes / rate + self._latency(hardware)

    def exchange_seconds(self, sent_bytes: float, hardware: Hardware) -> float:
        """Estimate one all-to-all.

        The part for other nodes leaves through the rank's own network card.
        """
        if self.size == 1:
            return 0.0
        inside = self.members_per_node(hardware) - 1
        far = self.exchanged_between_nodes(sent_bytes, hardware)
        slower = far / hardware.network_bytes_per_second
        if inside:
            near = (sent_bytes - far) / hardware.rate_inside_node(inside)
            slower = max(near, slower)
        return slower / hardware.exchange_share + self._latency(hardware)

    def is_inside_node(self, hardware: Hardware) -> bool:
        """Tell whether a node holds the whole group."""
        return self.members_per_node(hardware) == self.size

    def ringed_between_nodes(self, sent_bytes: float, hardware: Hardware) -> float:
        """Return what a rank's network card sends of a ring: the group's in a node share it."""
        if self.is_inside_node(hardware):
            return 0.0
        return sent_bytes / self.members_per_node(hardware)

    def exchanged_between_nodes(self, sent_bytes: float, hardware: Hardware) -> float:
        """Return what a rank sends to other nodes of an all-to-all."""
        others = self.size - 1
        inside = self.members_per_node(hardware) - 1
        return sent_bytes * (others - inside) / others if others else 0.0

    def _latency(self, hardware: Hardware) -> float:
        """Return the seconds that a collective takes before its first byte."""
        return hardware.efficiency.collective_latency_seconds * math.log2(self.size)

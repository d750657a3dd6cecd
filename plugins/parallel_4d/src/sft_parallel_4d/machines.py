"""Machines by name, and how fast a group of devices exchanges data on one: what a plan's time is reckoned with."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Nodes of ``devices`` each, in figures of one device: what it could do at best, and what share of that a run gets.

    Attributes:
        memory: Bytes.
        flops: Operations a second of products in 16 bits.
        flops32: In float32.
        stream: Bytes a second from and to its own memory.
        within: Bytes a second that it sends to devices of its node, one way.
        between: Likewise to other nodes, by its share of the node's network.
        host: Likewise to the host's memory, and from it.
        latency: Seconds that a message takes at least within a node.
        far_latency: Between nodes.
        efficiency: Of ``flops`` and ``flops32``, what training gets while it computes.
        links: Of the other speeds, what large messages get.
    """

    devices: int
    memory: int
    flops: float
    flops32: float
    stream: float
    within: float
    between: float
    host: float = 25e9
    latency: float = 5e-6
    far_latency: float = 15e-6
    efficiency: float = 0.5
    links: float = 0.8

    def peak(self, products: int) -> float:
        """Operations a second at best where products are of so many bits."""
        return self.flops if products == 16 else self.flops32

    def way(self, size: int, stride: int) -> Way:
        """How a ring of ``size`` devices exchanges data that stand ``stride`` apart, those of a node one after the
        other. Where it leaves the node, each member that it has there brings its share of the network."""
        if size <= 1:
            return Way(math.inf, 0.0)
        inside = min(size, max(1, self.devices // stride))
        if size <= inside:
            return Way(self.links * self.within, (size - 1) * self.latency)
        speed = self.between * inside if inside == 1 else min(self.within, self.between * inside)
        nodes = math.ceil(size / inside)
        # Within a node by a ring, between nodes by a tree, as NCCL does where there are many.
        return Way(self.links * speed, (inside - 1) * self.latency + math.ceil(math.log2(nodes)) * self.far_latency)


@dataclass(frozen=True)
class Way:
    """Bytes a second that each member of a group sends, and the seconds that a collective takes however small it is."""

    speed: float
    latency: float

    def seconds(self, size: float, calls: float = 1.0) -> float:
        """Of so many bytes that one sends, in so many collectives."""
        return size / self.speed + calls * self.latency


def taken(machine: Machine, products: int) -> str:
    """The speeds that times are reckoned with, where products are of so many bits."""
    return (
        f"{machine.efficiency:.0%} of {machine.peak(products) / 1e12:g} TFLOP/s ({products} bits), {machine.links:.0%} "
        f"of {machine.within / 1e9:g} GB/s within a node and of {machine.between / 1e9:g} GB/s between nodes"
    )


GB = 10**9
MACHINES = {
    # NVIDIA A100 80GB SXM datasheet: 312 TFLOPS BF16 dense, 19.5 FP32, 2,039 GB/s HBM2e, NVLink 600 GB/s both ways,
    # PCIe Gen4 64 GB/s both ways. NVIDIA DGX A100 datasheet: 8 ConnectX of 200 Gb/s for 8 devices.
    "8xA100-80G": Machine(8, 80 * 2**30, 312e12, 19.5e12, 2039e9, 300e9, 25e9),
    # NVIDIA H100 SXM5 datasheet: 989 TFLOPS BF16 dense, 67 FP32, 3.35 TB/s HBM3, NVLink 900 GB/s both ways, PCIe Gen5
    # 128 GB/s both ways. NVIDIA DGX H100 datasheet: 8 ConnectX-7 of 400 Gb/s for 8 devices.
    "8xH100-80G": Machine(8, 80 * 2**30, 989e12, 67e12, 3350e9, 450e9, 50e9, host=50e9),
    # H800 SXM5: as the H100, with NVLink of 400 GB/s both ways (DeepSeek-V3, arXiv 2412.19437, section 3.1 and
    # arXiv 2505.09343, section 4.1, on nodes of 8 with a NIC of 400 Gb/s for each).
    "8xH800-80G": Machine(8, 80 * 2**30, 989e12, 67e12, 3350e9, 200e9, 50e9, host=50e9),
    # NVIDIA L40S datasheet: 362 TFLOPS BF16 dense, 91.6 FP32, 864 GB/s GDDR6, no NVLink, PCIe Gen4 x16 64 GB/s both
    # ways, 48 GB. NVIDIA OVX server reference for 8 of them: 400 Gb/s of network a node for training.
    "8xL40S-48G": Machine(8, 48 * 10**9, 362e12, 91.6e12, 864e9, 32e9, 6.25e9, latency=10e-6),
}
"""By what a node has; sources are beside each."""
DEFAULT = "8xA100-80G"

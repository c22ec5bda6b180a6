"""How long devices take to exchange bytes, from bus bandwidth measured by payload, not from link peaks.

Bus bandwidth is what nccl-tests defines: bytes that cross the slowest link, over time; the factor of each
collective says how many times its payload does (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from functools import cache
from math import exp, log

from .hardware import GIB, Hardware, data

NODE_CURVE, NETWORK_CURVE = "8x-h200", "4x8-b200"  # the latencies where a device has no curve of its own
LINK_PART = 0.78  # of a link's peak that a node's bus reaches: A100 235 of 300 (measured)
NETWORK_PART = 0.74  # of a port's peak: 4 nodes of B200, 37 of 50 GB/s a port (measured, ml-engineering)
HOP = 14e-6  # seconds a node of a ring: NCCL, src/graph/tuning.cc, NET with the simple protocol
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB}


@cache
def curve(name: str) -> tuple[tuple[float, float], ...]:
    """(payload in bytes, seconds of an all-reduce), by payload, of a measured curve."""
    entry = data()["busbw"][name]
    points = []
    for label, gbs in entry["all_reduce_gbs"].items():
        size, unit = label.split()
        payload = float(size) * UNITS[unit]
        points.append((payload, payload * factor("all_reduce", entry["devices"]) / (gbs * 1e9)))
    return tuple(sorted(points))


def factor(collective: str, n: int) -> float:
    """Times that the payload crosses the slowest link among n devices.

    The payload is what one device has before a reduce, or after a gather.
    """
    return {
        "all_reduce": 2 * (n - 1) / n,
        "all_gather": (n - 1) / n,
        "reduce_scatter": (n - 1) / n,
        "all_to_all": (n - 1) / n,
    }[collective]


def latency(name: str) -> float:
    """Seconds that a small payload takes: the least of the curve."""
    return min(seconds for _, seconds in curve(name))


def node_seconds(device: Hardware, wire: float) -> float:
    """Seconds to move `wire` bytes over the links of one device within its node."""
    if isinstance(device.busbw, str):
        return _interpolate(device.busbw, wire)
    rate = device.busbw or LINK_PART * device.link
    return latency(NODE_CURVE) + wire / rate


def network_seconds(device: Hardware, wire: float, delay: str = NETWORK_CURVE) -> float:
    """Seconds to move `wire` bytes over the network port of one device."""
    return latency(delay) + wire / (NETWORK_PART * device.network)


def send_seconds(device: Hardware, payload: float, in_node: bool) -> float:
    """Seconds to send `payload` bytes to one other device."""
    return node_seconds(device, payload) if in_node else network_seconds(device, payload, NODE_CURVE)


def _interpolate(name: str, wire: float) -> float:
    """Seconds by the curve, linear between logarithms of bytes on the wire and seconds."""
    scale = factor("all_reduce", data()["busbw"][name]["devices"])
    points = [(payload * scale, seconds) for payload, seconds in curve(name)]
    if wire <= points[0][0]:
        return points[0][1]
    if wire >= points[-1][0]:
        return points[-1][1] * wire / points[-1][0]
    after = next(i for i, (x, _) in enumerate(points) if x >= wire)
    (x0, t0), (x1, t1) = points[after - 1], points[after]
    part = log(wire / x0) / log(x1 / x0)
    return exp(log(t0) + part * log(t1 / t0))


def seconds(device: Hardware, collective: str, payload: float, n: int, in_node: int) -> float:
    """Seconds of a collective over n devices, of which `in_node` share a node.

    Over several nodes it is hierarchical: within the node first, then each device's port carries its part of
    the payload; the two stages follow each other.
    """
    if n == 1 or payload == 0:
        return 0.0
    in_node = max(1, min(n, in_node))
    if n <= in_node:
        return node_seconds(device, payload * factor(collective, n))
    nodes = n / in_node
    inner = node_seconds(device, payload * factor(collective, in_node)) if in_node > 1 else 0.0
    hops = 0.0 if collective == "all_reduce" else (nodes - 1) * HOP  # an all-reduce may take a tree
    return inner + hops + network_seconds(device, payload / in_node * factor(collective, nodes))

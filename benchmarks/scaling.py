"""What attention over a sequence that is spread over devices takes: time, overlap and memory, counted.

    python -P benchmarks/scaling.py [--chip NAME] [--link NAME] [--heads 32] [--key-heads 8] [--head-dim 128] [--plot FILE]

Nothing is measured here. Rates of products are those that were measured on one device, link speeds are what vendors
state, and bytes are counted; `tests/test_scaling.py` compares them with the collectives of compiled programs.
`docs/scaling.md` explains the model.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_fa.demo import program
from jax_fa.sequence_parallel.order import ORDERS, Spread

STRATEGIES = ("ring", "all_gather", "ulysses")
LENGTHS = tuple(1024 * k for k in (32, 128, 512, 2048, 10240))
DEVICES = (1, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Chip:
    """Operations per second of the forward and of the backward, with bytes of an element."""

    name: str
    forward: float
    backward: float
    memory: float  # bytes
    source: str


@dataclass(frozen=True)
class Link:
    """What a device sends to its neighbour while it receives as much, and the time before the first byte."""

    name: str
    bytes_per_second: float
    latency: float
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h200", 523e12, 359e12, 141e9, "measured: bfloat16, D=128, causal, S=4096"),
        Chip(
            "cpu", 0.80e12, 0.69e12, 256e9, "measured: two cores of AMD EPYC (Zen 5), bfloat16, D=128, causal"
        ),
        Chip("ascend-910b", 190e12, 150e12, 64e9, "not measured: half of the stated 376e12, 0.4 of it"),
    )
}
LINKS = {
    link.name: link
    for link in (
        Link("nvlink", 450e9, 3e-6, "NVLink 4: 900 GB/s in both directions together"),
        Link("hccs", 28e9, 5e-6, "one HCCS link of eight in a full mesh: 56 GB/s in both directions"),
        Link("infiniband", 50e9, 5e-6, "NDR: 400 Gb/s per device"),
        Link("ethernet", 12.5e9, 20e-6, "100 Gb/s per device"),
    )
}


@dataclass(frozen=True)
class Attention:
    """One layer: causal, or full if not; `window` keys before a query if not 0."""

    S: int
    N: int = 32
    K: int = 8
    D: int = 128
    itemsize: int = 2
    causal: bool = True
    window: int = 0

    def __post_init__(self) -> None:
        if self.window and not self.causal:
            raise ValueError(f"window must be 0 unless causal; got {self.window}")
        if min(self.N, self.K, self.D) < 1 or self.N % self.K:
            raise ValueError(
                f"heads must be a multiple of key heads, and all sizes at least 1; got {self.N}, {self.K}, {self.D}"
            )

    def flops(self, pairs: float) -> float:
        """Of the two products of the forward. The backward is counted with five."""
        return 4.0 * self.N * self.D * pairs

    @property
    def pairs(self) -> float:
        return _before(self, self.S, self.S)


def _before(call: Attention, rows: int, keys: int) -> float:
    """Visible pairs of the first `rows` queries and the first `keys` keys."""
    if not call.causal:
        return float(rows) * keys
    inside = min(rows, keys)
    seen = inside * (inside + 1) / 2 + (rows - inside) * keys
    if call.window:  # less those keys that are too far back: j < i - window + 1
        seen -= _before(Attention(S=call.S), max(0, rows - call.window), keys)
    return seen


def pairs(call: Attention, row: int, key: int, length: int) -> float:
    """Visible pairs of queries [row, row + length) and keys [key, key + length)."""
    ends = [(row + length, key + length, 1), (row, key + length, -1), (row + length, key, -1), (row, key, 1)]
    return sum(sign * _before(call, r, k) for r, k, sign in ends)


def chunks(order: str, devices: int) -> np.ndarray:
    """Which equal parts of the sequence each device holds, `[devices, parts]`."""
    spread = Spread("", devices, order == "zigzag")
    return np.stack(spread.starts(np.arange(devices), spread.chunks), axis=1)


def work(call: Attention, devices: int, order: str) -> np.ndarray:
    """Visible pairs `[step, device]` of a ring: at step t, device i has the keys of device i - t."""
    held = chunks(order, devices)
    length = call.S // held.size
    # A chunk sees the chunks before it alike, up to the window: their distance decides.
    by_distance = np.array([pairs(call, d * length, 0, length) for d in range(held.size)])
    ahead = 0.0 if call.causal else float(length) ** 2
    found = np.zeros((devices, devices))
    i = np.arange(devices)
    for t in range(devices):
        theirs = held[(i - t) % devices]
        for a in range(held.shape[1]):
            for b in range(held.shape[1]):
                distance = held[:, a] - theirs[:, b]
                found[t] += np.where(distance >= 0, by_distance[np.abs(distance)], ahead)
    return found


@dataclass(frozen=True)
class Step:
    """What devices compute between two exchanges, and what each of them sends meanwhile."""

    flops: float  # of the device that has most
    sent: float  # bytes


@dataclass(frozen=True)
class Pass:
    """Forward or backward of one layer on one of the devices."""

    first: float  # bytes sent before anything can be computed
    steps: tuple[Step, ...]
    last: float = 0.0  # bytes sent when all is computed
    hops: int = 1  # of these: messages one after another

    @property
    def sent(self) -> float:
        return self.first + sum(step.sent for step in self.steps) + self.last

    def seconds(self, rate: float, link: Link) -> float:
        def sending(size: float, hops: int = 1) -> float:
            return size / link.bytes_per_second + hops * link.latency if size else 0.0

        steps = sum(max(step.flops / rate, sending(step.sent)) for step in self.steps)
        return sending(self.first, self.hops) + steps + sending(self.last, self.hops)


def passes(call: Attention, devices: int, strategy: str, order: str) -> tuple[Pass, Pass]:
    """Forward and backward."""
    pairs_of = work(call, devices, order).max(axis=1)  # of the device that has most, at each step
    shard = call.S // devices
    heads = shard * call.D * call.itemsize
    queries, keys = call.N * heads, 2 * call.K * heads
    gradients = 2 * call.K * shard * call.D * 4  # of keys and values travel in float32
    share = (devices - 1) / devices
    if strategy == "ring":
        sends = int(np.flatnonzero(pairs_of)[-1])  # no step is sent that nobody looks at
        forward = [Step(call.flops(p), keys * (t < sends)) for t, p in enumerate(pairs_of[: sends + 1])]
        backward = [
            Step(2.5 * call.flops(p), (keys + gradients * (t > 0)) * (t < sends))
            for t, p in enumerate(pairs_of[: sends + 1])
        ]
        return Pass(0, tuple(forward)), Pass(0, tuple(backward), gradients * (sends > 0))
    if strategy == "all_gather":
        most = call.flops(work(call, devices, order).sum(axis=0).max())
        gathered, scattered = (devices - 1) * keys, (devices - 1) * gradients
        hops = math.ceil(math.log2(devices))
        return (
            Pass(gathered, (Step(most, 0),), hops=hops),
            Pass(gathered, (Step(2.5 * most, 0),), scattered, hops),
        )
    most = call.flops(call.pairs / devices)
    keys = 2 * max(call.K, devices) * heads  # each device has a key head
    return (
        Pass(share * (queries + keys), (Step(most, 0),), share * queries),
        Pass(share * queries, (Step(2.5 * most, 0),), share * (queries + keys)),
    )


def serves(call: Attention, devices: int, strategy: str, order: str) -> bool:
    """Whether the sequence and the heads can be split so."""
    parts = devices * (2 if order == "zigzag" else 1)
    return call.S % parts == 0 and (
        strategy != "ulysses" or (order == "contiguous" and call.N % devices == 0)
    )


def memory(call: Attention, devices: int, strategy: str) -> float:
    """Bytes on a device in the backward: inputs, output, gradients, and what other devices sent."""
    shard = call.S // devices
    heads = shard * call.D * call.itemsize
    queries, keys = call.N * heads, 2 * call.K * heads
    own = 4 * queries + 2 * keys + 2 * 4 * call.N * shard  # q, out, dout, dq; k, v and gradients; max and sum
    gradients = 2 * call.K * shard * call.D * 4
    return (
        own
        + {
            "ring": 2 * (keys + gradients),  # those at work and those on the way
            "all_gather": devices * (keys + gradients),
            "ulysses": 4 * queries + 2 * keys,  # the same by heads
        }[strategy]
    )


@dataclass(frozen=True)
class Plan:
    strategy: str
    order: str
    seconds: float
    efficiency: float  # of products spread evenly over all devices, with nothing sent
    bytes: float


def plans(call: Attention, devices: int, chip: Chip, link: Link) -> Iterator[Plan]:
    """Forward and backward of a layer, by every way that serves it."""
    ideal = call.flops(call.pairs) / devices * (1 / chip.forward + 2.5 / chip.backward)
    for strategy in STRATEGIES:
        for order in ORDERS:
            if not serves(call, devices, strategy, order):
                continue
            both = zip(passes(call, devices, strategy, order), (chip.forward, chip.backward), strict=True)
            seconds = sum(one.seconds(rate, link) for one, rate in both)
            yield Plan(strategy, order, seconds, ideal / seconds, memory(call, devices, strategy))


# --- output


def table(call: Attention, chip: Chip, link: Link) -> list[str]:
    """Rows of a Markdown table: the fastest way for each length and number of devices."""
    lines = [
        "| tokens | devices | fastest | forward and backward | of ideal | memory of a device |",
        "|---|---|---|---|---|---|",
    ]
    for S in LENGTHS:
        for devices in DEVICES:
            served = list(plans(Attention(S, call.N, call.K, call.D), devices, chip, link))
            best = min(served, key=lambda plan: plan.seconds)
            way = f"{best.strategy}, {best.order}" if devices > 1 else "one device"
            fits = "" if best.bytes < chip.memory else " (does not fit)"
            lines.append(
                f"| {S // 1024}k | {devices} | {way} | {_time(best.seconds)} | {best.efficiency:.0%} "
                f"| {best.bytes / 2**30:.2f} GiB{fits} |"
            )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def plot(path: Path, call: Attention, chip: Chip) -> None:
    """Efficiency by the number of devices: a panel for each link, a line for each way, at two lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    counts = [2**i for i in range(11)]
    for panel, link in zip(panels, LINKS.values(), strict=True):
        for S, style in ((128 * 1024, "-"), (2048 * 1024, "--")):
            ways: dict[tuple[str, str], list[tuple[int, float]]] = {}
            for devices in counts:
                for plan in plans(Attention(S, call.N, call.K, call.D), devices, chip, link):
                    ways.setdefault((plan.strategy, plan.order), []).append((devices, plan.efficiency))
            for colour, (way, points) in enumerate(ways.items()):
                label = f"{' '.join(way)}, {S // 1024}k" if panel is figure.axes[0] else None
                panel.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label)
        panel.set(title=f"{link.name}: {link.bytes_per_second / 1e9:g} GB/s each way", ylim=(0, 1.02))
        panel.set_xscale("log", base=4)
        panel.set_xticks(counts[::2], [str(n) for n in counts[::2]])
        panel.grid(alpha=0.3)
    for panel in figure.axes[2:]:
        panel.set_xlabel("devices")
    for panel in figure.axes[::2]:
        panel.set_ylabel("part of the ideal")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="h200", help="whose rates (default: %(default)s)")
    parser.add_argument(
        "--link", choices=LINKS, default="infiniband", help="between devices (default: %(default)s)"
    )
    for name, letter in (("--heads", "N"), ("--key-heads", "K"), ("--head-dim", "D")):
        default = getattr(Attention(1), letter)
        parser.add_argument(name, type=int, default=default, metavar=letter, help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw efficiencies (needs matplotlib)")
    options = parser.parse_args()
    try:
        if options.plot:
            program.check_plot(options.plot)
        call = Attention(1, options.heads, options.key_heads, options.head_dim)
    except ValueError as error:
        parser.error(str(error))
    chip, link = CHIPS[options.chip], LINKS[options.link]
    print(f"{chip.name}: {chip.source}; {link.name}: {link.source}")
    print(f"one causal layer, {call.N} query heads on {call.K} key heads, head_dim {call.D}, 16-bit\n")
    print("\n".join(table(call, chip, link)))
    if options.plot:
        plot(options.plot, call, chip)


if __name__ == "__main__":
    program.start(main)

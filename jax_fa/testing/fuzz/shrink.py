"""From a failure to a small one: field by field, as long as the same result is still wrong."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax_fa.testing.fuzz import inputs, kinds, paged, score, sharded
from jax_fa.testing.fuzz.program import Data, Program, draw_data
from jax_fa.testing.fuzz.trial import Runner

Run = Callable[[Program, Data], bool]  # whether it fails as the first one did
DRAWS = 6  # of a smaller program, whose arrays are other ones


def shrunk(program: Program, data: Data, fails: Run, seconds: float) -> tuple[Program, Data]:
    """The smallest that was found in that time."""
    end = time.monotonic() + seconds
    going = True
    while going and time.monotonic() < end:
        going = False
        for smaller in _smaller_programs(program):
            if time.monotonic() > end:
                break
            found = _failing(smaller, data, fails)
            if found is not None:
                program, data, going = smaller, found, True
                break
    for simpler in _simpler_data(data):
        if fails(program, simpler):
            data = simpler
    return program, data


def fails_alike(result: str) -> Run:
    """Whether this result is wrong; a program is compiled once for all data that follow one another."""
    last: dict[Program, Runner] = {}

    def fails(program: Program, data: Data) -> bool:
        if program not in last:
            last.clear()
            last[program] = Runner(program)
        try:
            verdict = last[program](data)
        except NotImplementedError:
            return False
        return any(_kind(fault.result) == _kind(result) for fault in verdict.faults)

    return fails


def _kind(result: str) -> str:
    """All derivatives are alike: which one is wrong first may change with the sizes."""
    return "derivative" if result.startswith("d") or result.endswith("'") else result


def _failing(program: Program, data: Data, fails: Run) -> Data | None:
    for again in (data, *(draw_data(program, seed) for seed in range(DRAWS))):
        if fails(program, again):
            return again
    return None


def _changed(program: Program, **fields: Any) -> Program | None:
    new = dataclasses.replace(program, **fields)
    return None if new == program else new


def _smaller_programs(p: Program) -> Iterator[Program]:
    simple: dict[str, list[Any]] = {
        "how": ["jit"],
        "joined": ["all"],
        "page_scales": [False],
        "pages": [None],
        "mapped": [(), *([(name,) for name in p.mapped] if len(p.mapped) > 1 else [])],
        "mapped_last": [False],
        "vmap_outside": [True],
        "derivative": ["none", "reverse", "forward"],
        "max_logits": [False],
        "dropout": [None, "known"],
        "sinks": [None, "N"],
        "slopes": [None, "N"],
        "cap": [None, "known"],
        "scale": [None, "known"],
        "bias": [None, "QK", "1"],
        "known_mask": [False],
        "mask": [p.mask[:i] + p.mask[i + 1 :] for i in range(len(p.mask))],
        "layout": ["BSND"],
        "B": [(), (1,), (2,)],
        "dtype": ["float32"],
    }
    sizes = {"N": (p.K, 1), "K": (1,), "Dv": (p.D, 1), "D": (1,), "Sq": (1,), "Skv": (1,)}
    for name, values in simple.items():
        now = getattr(p, name)
        for value in values[: values.index(now)] if now in values else values:
            new = _changed(p, **{name: value})
            if new is not None and _fits(new):
                yield new
    for name, least in sizes.items():
        now = getattr(p, name)
        for value in sorted({*least, now // 2, now - now // 4, now - 1}):
            new = _changed(p, **{name: value})
            if 0 < value < now and new is not None and _fits(new):
                yield new


def _fits(p: Program) -> bool:
    batches = {"SBND": len(p.B) == 1, "SND": not p.B, "NSD": not p.B}.get(p.layout, True)
    mapped = set(p.mapped) <= {
        *p.operands,
        *(["mask"] if p.mask else []),
        *(["dropout_key"] if p.dropout else []),
    }
    square = p.Sq == p.Skv or not any(name == "segments_self" for name in p.mask)
    doubles = p.how != "doubled" or not p.dropout
    joined = len(p.mask) >= kinds.COMBINATIONS[p.joined].fewest or not p.mask
    if p.entry == score.ENTRY and not p.mask:  # its mode
        return False
    paged_alike = p.entry != paged.ENTRY or (
        len(p.B) == 1
        and p.layout == "BSND"
        and p.mask[0].startswith("pages")
        and p.mask[1:3] == ("key_lengths", "causal_bottom")
        and p.Skv % paged.page_size(p) == 0
    )
    lengths = p.how != "sharded" or sharded.fitted(p) == p
    mapped = mapped and inputs.maps_an_array(p)
    return batches and mapped and square and doubles and joined and paged_alike and lengths and p.N % p.K == 0


def _simpler_data(data: Data) -> Iterator[Data]:
    for name, value in (
        ("visible_garbage", False),
        ("garbage", None),
        ("infinite_bias", False),
        ("spread", 1.0),
        ("size", 1.0),
    ):
        if getattr(data, name) != value:
            simpler: dict[str, Any] = {name: value}
            yield dataclasses.replace(data, **simpler)

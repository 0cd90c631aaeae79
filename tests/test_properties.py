"""Any combination of sizes, layout, dtype, mask, bias, slopes, cap and dropout is right, with its gradients."""

from typing import Any

import jax
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fa.testing.case_masks import KINDS
from jax_fa.testing.cases import KEYS, ROWS, Case, check

LENGTHS = st.sampled_from([1, ROWS - 1, ROWS + 1, KEYS, 2 * KEYS + 3])
KIND = st.sampled_from([None, *(kind for kind in KINDS if kind != "nothing")])


@st.composite
def calls(draw) -> dict[str, Any]:
    """The fields of a case."""
    layout = draw(st.sampled_from(["BSND", "BNSD", "SBND", "SND", "NSD"]))
    B = (
        ()
        if "B" not in layout
        else draw(st.sampled_from([(1,), (2,)] if layout == "SBND" else [(), (2,), (2, 2)]))
    )
    heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    options = {
        "B": B,
        "Sq": draw(LENGTHS),
        "Skv": draw(LENGTHS),
        "N": heads[0],
        "K": heads[1],
        "Dv": draw(st.sampled_from([16, 24])),
        "mask": draw(KIND),
        "bias": draw(st.sampled_from([None, None, "BNQK", "NQK", "B11K", "N11", "QK"])),
        "slopes": draw(st.sampled_from([None, None, "N", "BN"])),
        "soft_cap": draw(st.sampled_from([None, None, 3.0])),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.0, 0.2])),
    }
    name = "-".join(str(x) for x in (layout, dtype, *options.values()))
    return {"name": name, "layout": layout, "dtype": dtype, **options}


@settings(max_examples=12)
@given(calls())
def test_any_combination(backend, call):
    case = Case(**call)
    dout, dlse = case.cotangents()
    run = jax.jit(lambda *x: case.gradient(*x, implementation=backend))
    (out, lse), gradients = run(case.stored_operands(), case.stored(dout), dlse)
    check(case, out, lse, gradients)

"""The page Comparison: calls of libraries that are tried, and what the sources of others say.

    python -P docs/compare.py                  # writes comparison.md from comparison.json
    python -P docs/compare.py --try jax.nn     # tries that library's calls first, and keeps what came out

What is called is in `compare_features.py`, how in `compare_libraries.py`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
calls = importlib.import_module("compare_features")
LIBRARIES, FEATURES = calls.libraries.LIBRARIES, calls.FEATURES
DATA, PAGE = HERE / "comparison.json", HERE / "comparison.md"

HEAD = """# Comparison

There are two tables, made by `docs/compare.py`. The first holds the results of small calls on CPU, compared with float64
NumPy: "no" means that the library has no such argument, that the call raised (the exception is named), or that its values
are wrong. The second is from documentation and source code, also of libraries for other hardware, as of November 2026; –
means that it was not looked up.
"""
TAIL = """
All calls ran on CPU, those of JAX under `jit`. Kernels for GPUs have other limits and other memory.

- A feature without an argument can often be written by hand: packed sequences, lengths and windows as a boolean mask, ALiBi
  as a bias, sinks from the log-sum-exp.
- PyTorch flex_attention was called without `torch.compile`. Its windows, lengths, packed sequences, bias, soft cap and ALiBi
  are functions. On CPU it has no backward for query, key and value, so gradients that need it could not be tried; by its
  source code, its log-sum-exp has a gradient on GPUs.
- Besides SDPA, PyTorch has `torch.nn.attention.varlen.varlen_attn` for GPUs, with packed sequences, windows and the
  log-sum-exp, and nested tensors.

Each feature is a function in `docs/compare_features.py`. `python -P docs/compare.py --try jax.nn` repeats the calls.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(data: dict[str, Any]) -> str:
    run, read = data["tried"], data["read"]
    first = [name for name in LIBRARIES if name in run]
    found = [
        HEAD,
        "## Calls that were run\n",
        table(
            ["", *(f"{name} {run[name]['version']}" for name in first)],
            [
                [feature, *(run[name]["cells"].get(feature, "–") for name in first)]
                for feature in FEATURES
            ],
        ),
        TAIL.lstrip(),
        "## From documentation and source code\n",
        table(
            ["", *read],
            [
                [feature, *(read[x]["cells"].get(feature, "–") for x in read)]
                for feature in data["rows"]
            ],
        ),
        "Read: " + "; ".join(f"{name}: {read[name]['source']}" for name in read) + ".\n",
    ]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--try",
        dest="libraries",
        nargs="*",
        default=[],
        choices=list(LIBRARIES),
        metavar="LIBRARY",
    )
    given = parser.parse_args()
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for title in given.libraries:
        data["tried"][title] = calls.tried(title)
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()

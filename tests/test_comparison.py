"""The page Comparison is what its script makes of its data, and its calls come out as they are recorded."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def _script():
    spec = importlib.util.spec_from_file_location("compare", DOCS / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPARE = _script()
DATA = json.loads(COMPARE.DATA.read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_data():
    assert COMPARE.PAGE.read_text(encoding="utf-8") == COMPARE.page(DATA)


def test_every_cell_has_evidence():
    """What was run has every feature; what was read has no row that no table shows."""
    assert DATA["tried"].keys() == COMPARE.LIBRARIES.keys()
    for name, found in DATA["tried"].items():
        assert found["version"] and found["cells"].keys() == COMPARE.FEATURES.keys(), name
    for name, found in DATA["read"].items():
        assert found["source"] and found["cells"].keys() <= set(DATA["rows"]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", DATA["tried"])
def test_calls_come_out_as_recorded(name):
    pytest.importorskip(COMPARE.LIBRARIES[name].package)
    x64 = jax.config.jax_enable_x64
    try:
        with jax.numpy_dtype_promotion("standard"):
            found = COMPARE.calls.tried(name)
    finally:
        jax.config.update("jax_enable_x64", x64)
    if found["version"] != DATA["tried"][name]["version"]:
        pytest.skip(f"recorded with {DATA['tried'][name]['version']}")
    del (
        found["cells"][COMPARE.calls.MEMORY],
        DATA["tried"][name]["cells"][COMPARE.calls.MEMORY],
    )  # the tests have small tiles
    assert found["cells"] == DATA["tried"][name]["cells"]

"""Small models by layers of other libraries, trained with their attention and with ours. Skipped where one is not installed."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from layer_tools import FORWARD, S

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
integrations = importlib.import_module("integrations")


@pytest.mark.filterwarnings("ignore:w_init_scale is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", integrations.layers.LAYERS)
def test_models_train_alike(name, monkeypatch, tmp_path):
    """50 steps from the same parameters."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # both are read when Keras is first imported
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    make, module, _ = integrations.MODELS[name]
    pytest.importorskip(module)
    with jax.numpy_dtype_promotion("standard"):
        model = make(S)
        for loss, calls in ((model.loss, False), (model.ours, True)):
            assert (FORWARD in str(jax.make_jaxpr(loss)(model.parameters, model.batch))) == calls
        before, after = integrations.compare(model, 50)
    assert before.losses[-1] < 0.5 * before.losses[0]  # it learns
    np.testing.assert_allclose(after.losses, before.losses, rtol=1e-5)

"""Small models of other libraries as they are, and with our attention: 50 losses, the time of a step, temporary memory.

    python -P benchmarks/integrations.py [--only NAME] [--steps 50]

Models whose library is not installed are left out. Ratios are ours over theirs; the tests compare the losses.
"""

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.integrations import gemma, levanter, maxtext, tokamax

sys.path.insert(0, str(Path(__file__).resolve().parent))
layers = importlib.import_module("layers")


Loss = Callable[[Any, Any], Any]


class Model(NamedTuple):
    """A loss of parameters and a batch, as it is and with our attention."""

    loss: Loss
    ours: Loss
    parameters: Any
    batch: Any
    rate: float


class Run(NamedTuple):
    """What a model did: losses, the fastest step in seconds, temporary bytes of a step."""

    losses: list[float]
    seconds: float
    temporary: int


def _inside(context: contextlib.AbstractContextManager, loss: Loss) -> Loss:
    """The loss, traced inside of a context. It is traced once."""

    def inside(parameters, batch):
        with context:
            return loss(parameters, batch)

    return inside


def of_layers(name: str, size: int) -> Model:
    make, module = layers.LAYERS[name]
    library = importlib.import_module(module)

    def loss_of(apply):
        return lambda parameters, x: jnp.mean((apply(parameters, x)[:, :-1] - x[:, 1:]) ** 2)

    (parameters, theirs), (same, ours) = make(library, size, False), make(library, size, True)
    if not jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(parameters), jax.tree.leaves(same))):
        raise AssertionError(f"{name}: both models should begin with the same parameters")
    return Model(loss_of(theirs), loss_of(ours), parameters, layers.walk(size), 0.1)


def alphafold(size: int) -> Model:
    """Attention of the rows of a pair representation, with a bias of each head, as AlphaFold 3 calls tokamax."""
    library = importlib.import_module("tokamax")
    flags = importlib.import_module("absl.flags")
    if not flags.FLAGS.is_parsed():  # tokamax would parse those of this program
        flags.FLAGS(["integrations"])
    width, heads, channels = 32, 4, 16

    def loss(parameters, batch):
        pair, mask = batch
        query, key, value = jnp.einsum("...e,aenh->a...nh", pair, parameters["qkv"])
        out = library.dot_product_attention(
            query,
            key,
            value,
            mask=mask[:, None, None, :],
            bias=jnp.einsum("ije,en->nij", pair, parameters["bias"])[None],
            implementation="xla",
        )
        return jnp.mean((jnp.einsum("...nh,nhe->...e", out, parameters["out"]) - pair) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    parameters = {
        "qkv": jax.random.normal(keys[0], (3, width, heads, channels)) / width**0.5,
        "bias": jax.random.normal(keys[1], (width, heads)) / width**0.5,
        "out": jax.random.normal(keys[2], (heads, channels, width)) / (heads * channels) ** 0.5,
    }
    pair = jax.random.normal(keys[3], (size, size, width))
    mask = jnp.ones((size, size), bool).at[:, -size // 5 :].set(False)
    ours = mock.patch.object(library, "dot_product_attention", tokamax.dot_product_attention)
    return Model(loss, _inside(ours, loss), parameters, (pair, mask), 0.5)


def _small_gemma(library: Any, size: int) -> dict[str, Any]:
    """What both of its implementations call alike."""
    return {
        "num_embed": 64,
        "embed_dim": 64,
        "hidden_dim": 64,
        "num_heads": 4,
        "head_dim": 32,
        "num_kv_heads": 2,
        "final_logit_softcap": 30.0,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "attention_types": (library.AttentionType.LOCAL_SLIDING, library.AttentionType.GLOBAL),
        "attn_logits_soft_cap": 50.0,
        "sliding_window_size": max(2, size // 8),
    }


def gemma_own(size: int) -> Model:
    """The transformer of gemma: two layers, local and global, with a soft cap and shared key heads."""
    library = importlib.import_module("gemma.gm.nn._modules")
    rope = importlib.import_module("gemma.gm.math._positional_embeddings").apply_rope
    config = importlib.import_module("gemma.gm.nn.config").TransformerConfig(
        **_small_gemma(library, size), use_qk_norm=True
    )
    make = importlib.import_module("gemma.gm.nn").Transformer
    model = make(config=config, dtype=jnp.float32, tokens="tokens")

    class Attention(library.Attention):  # type: ignore[name-defined]  # of a module that is found at run time
        """The layer's own, without a cache, with our attention between its projections."""

        def __call__(self, x, segment_pos, cache, attn_mask):
            query = self._query_norm(self.q_einsum("BTD,NDH->BTNH", x))
            key, value = self.kv_einsum("BSD,CKDH->CBSKH", x)
            turns = {"base_frequency": self.rope_base_frequency, "scale_factor": self.rope_scale_factor}
            local = self.attn_type == library.AttentionType.LOCAL_SLIDING
            encoded = gemma.attention(
                rope(query, segment_pos, **turns) * self.query_pre_attn_scalar,
                rope(self._key_norm(key), segment_pos, **turns),
                value,
                attn_mask,
                attn_logits_soft_cap=self.attn_logits_soft_cap,
                sliding_window_size=self.sliding_window_size if local else None,
            )
            return cache, self.attn_vec_einsum("BTNH,NHD->BTD", encoded)

    def logits(variables, tokens, positions, mask):
        return model.apply(variables, tokens, positions=positions, attention_mask=mask).logits

    @contextlib.contextmanager
    def ours():
        with mock.patch.object(library, "Attention", Attention):
            jax.clear_caches()  # the model is jitted, and its own trace would be used again
            yield
        jax.clear_caches()

    batch = _sorted_tokens(size)
    parameters = model.init(jax.random.key(0), batch[0], positions=batch[1], attention_mask=batch[2])
    loss = _of_next_token(logits)
    return Model(loss, _inside(ours(), loss), parameters, batch, 0.05)


def _sorted_tokens(size: int) -> tuple[Any, Any, Any]:
    """Tokens, in an order that can be learned, their positions and the causal mask."""
    tokens = jnp.sort(jax.random.randint(jax.random.key(1), (2, size), 0, 64), axis=1)
    positions = jnp.broadcast_to(jnp.arange(size), (2, size))
    return tokens, positions, jnp.broadcast_to(jnp.tri(size, dtype=bool), (2, size, size))


def _of_next_token(logits: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def loss(parameters, batch):
        found = jax.nn.log_softmax(logits(parameters, *batch)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(found, batch[0][:, 1:, None], axis=-1))

    return loss


def gemma2(size: int) -> Model:
    """The Gemma 2 of tunix: two layers, local and global, with a soft cap and shared key heads."""
    library = importlib.import_module("tunix.models.gemma.model")
    nnx = importlib.import_module("flax.nnx")
    config = library.ModelConfig(num_layers=2, **_small_gemma(library, size))
    graph, parameters = nnx.split(library.Gemma(config, rngs=nnx.Rngs(0)))
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), parameters)

    def block(self, x, segment_pos, cache, attn_mask):
        """The layer's own, without a cache, with our attention between its projections."""
        query = self.q_einsum(x)
        key, value = self.kv_einsum(x)
        query, key = (library.apply_rope(a, segment_pos, head_dim=self.head_dim) for a in (query, key))
        local = self.attn_type == library.AttentionType.LOCAL_SLIDING
        encoded = gemma.attention(
            query * self.head_dim**-0.5,
            key,
            value,
            attn_mask,
            attn_logits_soft_cap=self.attn_logits_soft_cap,
            sliding_window_size=self.sliding_window_size if local else None,
            segment_pos=segment_pos if local else None,
            cache_positions=np.arange(x.shape[1]) if local else None,
        )
        return cache, self.attn_vec_einsum(encoded)

    def logits(parameters, tokens, positions, mask):
        return nnx.merge(graph, parameters)(tokens, positions, None, mask)[0]

    ours = mock.patch.object(library.Attention, "block", block)
    loss = _of_next_token(logits)
    return Model(loss, _inside(ours, loss), parameters, _sorted_tokens(size), 0.05)


def levanter_block(size: int) -> Model:
    """Causal attention in a window, over packed sequences, with levanter's mask and named arrays."""
    library = importlib.import_module("levanter.layers.attention")
    hax = importlib.import_module("haliax")
    axes = hax.make_axes(Batch=2, Pos=size, KeyPos=size, Heads=2, Group=2, Size=32, Embed=64)
    Batch, Pos, KeyPos, Heads, Group, Size, Embed = axes  # noqa: N806 (names of axes)

    def loss(parameters, batch):
        x, ids = batch
        query = hax.dot(x, parameters["q"], axis=Embed)
        key = hax.dot(x, parameters["k"], axis=Embed).rename({"Pos": "KeyPos"})
        value = hax.dot(x, parameters["v"], axis=Embed).rename({"Pos": "KeyPos"})
        mask = library.AttentionMask.causal(sliding_window=max(2, size // 4)).with_segment_ids(ids)
        out = library.dot_product_attention(
            Pos, KeyPos, Size, query, key, value, mask=mask, attn_backend=library.AttentionBackend.VANILLA
        )
        y = x + hax.dot(out, parameters["out"], axis=(Heads, Group, Size))
        return jnp.mean((y.array[:, :-1] - x.array[:, 1:]) ** 2)

    keys = jax.random.split(jax.random.key(0), 5)
    parameters = {
        "q": hax.random.normal(keys[0], (Embed, Heads, Group, Size)) / 8,
        "k": hax.random.normal(keys[1], (Embed, Heads, Size)) / 8,
        "v": hax.random.normal(keys[2], (Embed, Heads, Size)) / 8,
        "out": hax.random.normal(keys[3], (Heads, Group, Size, Embed)) / 11,
    }
    x = hax.named(
        jnp.cumsum(jax.random.normal(keys[4], (2, size, 64)), axis=1) / size**0.5, (Batch, Pos, Embed)
    )
    ids = hax.named(jnp.broadcast_to(jnp.arange(size) // (size // 2), (2, size)), (Batch, Pos))
    ours = mock.patch.object(library, "dot_product_attention", levanter.dot_product_attention)
    return Model(loss, _inside(ours, loss), parameters, (x, ids), 0.1)


def _maxtext_settings(**options) -> tuple[Any, jax.sharding.Mesh]:
    settings = importlib.import_module("maxtext.configs.pyconfig")
    base = Path(str(settings.__file__)).parent / "base.yml"
    config = settings.initialize(
        ["", str(base)],
        run_name="small",
        attention="dot_product",
        enable_checkpointing=False,
        log_config=False,
        skip_jax_distributed_system=True,
        **options,
    )
    names = config.mesh_axes
    return config, jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(names)), names)


def maxtext_model(size: int) -> Model:
    """MaxText's whole model with Gemma 2's layers, local and global in turn, over packed sequences."""
    library = importlib.import_module("maxtext.models.models")
    op = importlib.import_module("maxtext.layers.attention_op")
    nnx = importlib.import_module("flax.nnx")
    config, mesh = _maxtext_settings(
        decoder_block="gemma2",
        base_num_decoder_layers=1,  # of a local and a global one
        base_emb_dim=64,
        base_mlp_dim=128,
        base_num_query_heads=4,
        base_num_kv_heads=2,
        head_dim=32,
        vocab_size=64,
        max_target_length=size,
        sliding_window_size=max(2, size // 8),
        attn_logits_soft_cap=50.0,
        final_logits_soft_cap=30.0,
        dtype="float32",
        matmul_precision="highest",
        scan_layers=False,
    )
    with jax.set_mesh(mesh):
        model = library.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(0), model_mode="train")
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def logits(parameters, tokens, positions, ids):
        model = nnx.merge(graph, parameters, jax.tree.map(jnp.asarray, rest))
        return model(tokens, positions, ids, enable_dropout=False)

    tokens, positions, _ = _sorted_tokens(size)
    ids = positions // (size // 2) + 1
    ours = mock.patch.object(op.AttentionOp, "apply_attention", maxtext.apply_attention)
    loss = _of_next_token(logits)
    batch = (tokens, positions % (size // 2), ids)
    return Model(loss, _inside(ours, loss), parameters, batch, 0.05)


def maxtext_block(size: int) -> Model:
    """An `AttentionOp` of MaxText with its settings: a window and a soft cap, over packed sequences."""
    library = importlib.import_module("maxtext.layers.attention_op")
    config, mesh = _maxtext_settings()
    op = library.AttentionOp(
        config=config,
        mesh=mesh,
        attention_kernel="dot_product",
        max_target_length=size,
        num_query_heads=4,
        num_kv_heads=2,
        attention_type=library.AttentionType.LOCAL_SLIDING,
        attn_logits_soft_cap=50.0,
        sliding_window_size=max(2, size // 4),
    )

    def loss(parameters, batch):
        x, ids = batch
        query = jnp.einsum("bse,enh->bsnh", x, parameters["q"])
        key, value = jnp.einsum("bse,aekh->abskh", x, parameters["kv"])
        out = op(query, key, value, ids, None, "train")
        y = x + jnp.einsum("bsnh,nhe->bse", out, parameters["out"])
        return jnp.mean((y[:, :-1] - x[:, 1:]) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    parameters = {
        "q": jax.random.normal(keys[0], (64, 4, 32)) / 8 / 32**0.5,  # whose initializer scales the logits
        "kv": jax.random.normal(keys[1], (2, 64, 2, 32)) / 8,
        "out": jax.random.normal(keys[2], (4, 32, 64)) / 11,
    }
    x = jnp.cumsum(jax.random.normal(keys[3], (2, size, 64)), axis=1) / size**0.5
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32) // (size // 2) + 1, (2, size))
    ours = mock.patch.object(library.AttentionOp, "apply_attention", maxtext.apply_attention)
    return Model(loss, _inside(ours, loss), parameters, (x, ids), 0.1)


# What makes a model, the module that it needs, and a size for a benchmark.
MODELS: dict[str, tuple[Callable[[int], Model], str, int]] = {
    **{name: (partial(of_layers, name), layer.module, 1024) for name, layer in layers.LAYERS.items()},
    "alphafold": (alphafold, "tokamax", 128),
    "gemma": (gemma_own, "gemma.gm.nn", 1024),
    "gemma2": (gemma2, "tunix.models.gemma.model", 1024),
    "levanter": (levanter_block, "levanter.layers.attention", 1024),
    "maxtext": (maxtext_block, "maxtext.layers.attention_op", 1024),
    "maxtext-model": (maxtext_model, "maxtext.models.models", 1024),
}


def compare(model: Model, steps: int) -> tuple[Run, Run]:
    """Theirs and ours, trained in turns from the same parameters."""

    def compiled(loss: Loss):
        def step(parameters, batch):
            found, gradients = jax.value_and_grad(loss)(parameters, batch)
            return found, jax.tree.map(lambda p, g: p - model.rate * g, parameters, gradients)

        return jax.jit(step).lower(model.parameters, model.batch).compile()

    programs = (compiled(model.loss), compiled(model.ours))
    parameters = [model.parameters, model.parameters]
    losses: tuple[list[float], list[float]] = ([], [])
    seconds = [float("inf")] * 2
    for _ in range(steps):
        for i, program in enumerate(programs):
            start = time.perf_counter()
            found, parameters[i] = jax.block_until_ready(program(parameters[i], model.batch))
            seconds[i] = min(seconds[i], time.perf_counter() - start)
            losses[i].append(float(found))
    first, second = (
        Run(losses[i], seconds[i], program.memory_analysis().temp_size_in_bytes)
        for i, program in enumerate(programs)
    )
    return first, second


def present(only: str = "") -> Iterator[str]:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    for name, (_, module, _) in MODELS.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            if only in name:
                yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    print(
        f"{'model':<14}{'step':>24}{'ratio':>8}{'temporary':>26}{'ratio':>8}  loss, first to last; largest difference"
    )
    for name in present(given.only):
        make, _, size = MODELS[name]
        theirs, ours = compare(make(size), given.steps)
        apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
        print(
            f"{name:<14}{theirs.seconds * 1e3:>9.1f} → {ours.seconds * 1e3:>7.1f} ms"
            f"{ours.seconds / theirs.seconds:>8.2f}"
            f"{theirs.temporary / 2**20:>10.1f} → {ours.temporary / 2**20:>8.1f} MiB"
            f"{ours.temporary / theirs.temporary:>8.2f}"
            f"  {theirs.losses[0]:.4f} to {theirs.losses[-1]:.4f}; {apart:.1e}"
        )


if __name__ == "__main__":
    main()

"""Libraries that the page Comparison calls: `attend(q, k, v, **canonical)` gives out, or (out, lse) with lse=True.

Query, key and value are `*B S N D`. What each library has no argument for raises `Unavailable`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np


class Unavailable(Exception):  # noqa: N818 (no error: an answer)
    """The library has no argument for this."""


def take(given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The arguments by the library's names; raises Unavailable for those that it has no name for."""
    missing = [name for name in given if name not in names]
    if missing:
        raise Unavailable(missing[0])
    return {names[name]: x for name, x in given.items()}


class OfJax:
    """A function of JAX arrays `*B S N D`."""

    package = "jax"

    def __init__(self) -> None:
        import jax

        self.jax, self.np = jax, jax.numpy
        jax.config.update("jax_enable_x64", True)

    def attend(self, q, k, v, **given):
        """`call`, of arrays of JAX alone, as some libraries check."""
        made = self.np.asarray
        given = {n: made(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
        return self.call(*map(made, (q, k, v)), **given)

    def call(self, q, k, v, **given):
        raise NotImplementedError

    def run(self, fn, *args):
        return self.jax.tree.map(np.asarray, self.jax.jit(fn)(*map(self.np.asarray, args)))

    def gradient(self, fn, x):
        return self.run(self.jax.grad(lambda x: (fn(x) ** 2).sum()), x)

    def forward_mode(self, fn, x):
        return self.run(lambda x: self.jax.jvp(fn, (x,), (self.np.ones_like(x),))[1], x)

    def second(self, fn, x):
        def norm(x):
            return (self.jax.grad(lambda x: (fn(x) ** 2).sum())(x) ** 2).sum()

        return self.run(self.jax.grad(norm), x)

    def memory(self, size: int) -> int:
        x = self.jax.ShapeDtypeStruct((1, size, 2, 16), self.np.float32)
        compiled = self.jax.jit(lambda x: self.attend(x, x, x)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes


class JaxFa(OfJax):
    title, package = "jax_fa", "jax_fa"

    def call(self, q, k, v, **given):
        import jax_fa
        from jax_fa import masks

        kinds = {
            "window": lambda x: masks.SlidingWindow(*x),
            "lengths": lambda x: masks.Lengths(key=x),
            "segments": masks.SegmentIds,
            "mask": masks.Dense,
        }
        found = [kinds[name](given.pop(name)) for name in list(given) if name in kinds]
        names = {
            "bias": "bias",
            "cap": "logits_soft_cap",
            "sinks": "sinks",
            "lse": "return_logsumexp",
        }
        names |= {"score": "score_mod", "dropout": "dropout_rate", "alibi": "alibi_slopes"}
        if "dropout" in given:
            given |= {"dropout_key": self.jax.random.key(0)}
            names |= {"dropout_key": "dropout_key"}
        mask = functools.reduce(lambda a, b: a & b, found) if found else None
        return jax_fa.flash_attention(q, k, v, mask=mask, **take(given, names))


class JaxNn(OfJax):
    title = "jax.nn"
    names: ClassVar = {
        "mask": "mask",
        "bias": "bias",
        "window": "local_window_size",
        "lengths": "key_value_seq_lengths",
        "lse": "return_residual",
    }

    def call(self, q, k, v, **given):
        return self.jax.nn.dot_product_attention(q, k, v, **take(given, self.names))


class Tokamax(OfJax):
    title, package = "tokamax", "tokamax"
    names: ClassVar = {
        "mask": "mask",
        "bias": "bias",
        "window": "local_window_size",
        "lengths": "key_value_seq_lengths",
        "cap": "logits_soft_cap",
    }

    def __init__(self) -> None:
        super().__init__()
        self.library = importlib.import_module("tokamax")
        flags = importlib.import_module("absl.flags")
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["compare"], known_only=True)

    def call(self, q, k, v, **given):
        return self.library.dot_product_attention(q, k, v, **take(given, self.names))


class OfTorch:
    """A function of PyTorch tensors, on CPU, called with `*B N S D`."""

    package = "torch"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")

    def call(self, q, k, v, **given):
        raise NotImplementedError

    def attend(self, q, k, v, **given):
        made = self.torch.as_tensor
        given = {n: made(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
        found = self.call(*(made(x).transpose(-2, -3) for x in (q, k, v)), **given)
        out, *rest = found if isinstance(found, tuple) else (found,)
        out = out.transpose(-2, -3)
        return (out, *rest) if rest else out

    def run(self, fn, *args):
        found = fn(*map(self.torch.as_tensor, args))
        detached = [
            x.detach().numpy() for x in (found if isinstance(found, tuple) else (found,))
        ]
        return tuple(detached) if isinstance(found, tuple) else detached[0]

    def gradient(self, fn, x):
        x = self.torch.tensor(x, requires_grad=True)
        (found,) = self.torch.autograd.grad((fn(x) ** 2).sum(), x)
        return found.numpy()

    def forward_mode(self, fn, x):
        x = self.torch.as_tensor(x)
        return self.torch.func.jvp(fn, (x,), (self.torch.ones_like(x),))[1].numpy()

    def second(self, fn, x):
        x = self.torch.tensor(x, requires_grad=True)
        (first,) = self.torch.autograd.grad((fn(x) ** 2).sum(), x, create_graph=True)
        (found,) = self.torch.autograd.grad((first**2).sum(), x)
        return found.numpy()


class Sdpa(OfTorch):
    title = "PyTorch SDPA"

    def otherwise(self):
        """The backend that serves what the one chosen by default does not."""
        attention = importlib.import_module("torch.nn.attention")
        return "`SDPBackend.MATH`", attention.sdpa_kernel(attention.SDPBackend.MATH)

    def call(self, q, k, v, **given):
        if "bias" in given and "mask" not in given:
            given["mask"] = given.pop("bias")  # one argument for both
        return self.torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            enable_gqa=q.shape[-3] != k.shape[-3],
            **take(given, {"mask": "attn_mask", "dropout": "dropout_p"}),
        )


class Flex(OfTorch):
    title = "PyTorch flex_attention"

    def call(self, q, k, v, **given):
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        seen: list[Callable] = []
        scores: list[Callable] = []
        functions = {
            "window": lambda x: seen.append(
                lambda b, h, i, j: (i - j <= x[0]) & (j - i <= x[1])
            ),
            "lengths": lambda x: seen.append(lambda b, h, i, j: j < x[b]),
            "segments": lambda x: seen.append(lambda b, h, i, j: x[b, i] == x[b, j]),
            "mask": lambda x: seen.append(lambda b, h, i, j: x[0, 0, i, j]),
            "bias": lambda x: scores.append(lambda s, b, h, i, j: s + x[0, h, i, j]),
            "cap": lambda x: scores.append(
                lambda s, b, h, i, j: x * self.torch.tanh(s / x)
            ),
            "alibi": lambda x: scores.append(lambda s, b, h, i, j: s - x[h] * abs(i - j)),
            "score": lambda x: scores.append(x),
        }
        for name in [name for name in given if name in functions]:
            functions[name](given.pop(name))

        def score(s, b, h, i, j):
            for fn in scores:
                s = fn(s, b, h, i, j)
            return s

        block = None
        if seen:
            (fn,) = seen
            block = flex.create_block_mask(
                fn, q.shape[0], q.shape[1], q.shape[-2], k.shape[-2], device="cpu"
            )
        lse = take(given, {"lse": "lse"}).get("lse", False)
        found = flex.flex_attention(
            q,
            k,
            v,
            score_mod=score if scores else None,
            block_mask=block,
            enable_gqa=q.shape[-3] != k.shape[-3],
            return_aux=flex.AuxRequest(lse=True) if lse else None,
        )
        return (found[0], found[1].lse) if lse else found


LIBRARIES = {kind.title: kind for kind in (JaxFa, JaxNn, Tokamax, Sdpa, Flex)}

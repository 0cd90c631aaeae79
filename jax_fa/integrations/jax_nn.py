"""`patch_jax_nn`: code that calls `jax.nn.dot_product_attention` gets ours, without being changed."""

import contextlib
import functools
import threading
from typing import Any, NamedTuple

import jax

from jax_fa import api, backends

# What callers of jax.nn may ask for. These name JAX's own backends, so none of them says which of ours to take.
_THEIRS = (None, "xla", "cudnn")


class _Patch(NamedTuple):
    implementation: backends.Implementation


# Part of the key of jit's caches, so a function traced outside is traced anew inside, and the other way round.
_active = jax.make_user_context(None)


class _Attribute:
    """`jax.nn.dot_product_attention`, ours while any thread is inside of a patch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._theirs: Any = None
        self._ours: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._theirs = jax.nn.dot_product_attention
                self._ours = jax.nn.dot_product_attention = _dispatcher(self._theirs)
            self._inside += 1

    def exit(self) -> None:
        with self._lock:
            self._inside -= 1
            # Another patch may have come on top of ours; it goes on, and ours below it calls JAX's.
            if self._inside == 0 and jax.nn.dot_product_attention is self._ours:
                jax.nn.dot_product_attention = self._theirs


_attribute = _Attribute()


def _dispatcher(theirs):
    @functools.wraps(theirs)
    def dot_product_attention(*args, implementation=None, **kwargs):
        patch = _active.value
        if patch is None:  # a thread that is not inside
            return theirs(*args, implementation=implementation, **kwargs)
        if implementation not in _THEIRS:
            raise ValueError(
                f"implementation must be one of jax.nn's, {', '.join(map(repr, _THEIRS))}; got {implementation!r}. "
                "(Inside patch_jax_nn the call is served by jax_fa, whose backend the patch's argument names.)"
            )
        return api.dot_product_attention(*args, implementation=patch.implementation, **kwargs)

    return dot_product_attention


class _PatchJaxNN(contextlib.ContextDecorator):
    def __init__(self, patch: _Patch) -> None:
        self._patch = patch
        self._open = threading.local()

    def __enter__(self) -> None:
        context = _active(self._patch)
        _attribute.enter()
        context.__enter__()
        self._open.stack = [*getattr(self._open, "stack", ()), context]

    def __exit__(self, *error) -> None:
        context = self._open.stack.pop()
        try:
            context.__exit__(*error)
        finally:
            _attribute.exit()


def patch_jax_nn(*, implementation: backends.Implementation = None) -> _PatchJaxNN:
    """A context, or decorator, in which `jax.nn.dot_product_attention` is `jax_fa.dot_product_attention`.

        with patch_jax_nn():
            model(x)

    This reaches every caller that looks the function up when it calls it, as `jax.nn.dot_product_attention` or
    after `from jax import nn`. A name bound before, by `from jax.nn import dot_product_attention`, stays JAX's.

    It holds for the thread that enters it, like JAX's own contexts, and counts when a function is traced. It is
    part of the key of jit's caches: a jitted function that was called outside is traced anew inside, and the
    other way round. What has been compiled ahead of time or exported keeps what it was traced with. It can be
    entered any number of times, the same object too; the innermost counts.

    Callers' own `implementation` ("xla", "cudnn" or None) names a backend of JAX and is replaced by that of the
    patch. Where ours differs is listed in `jax_fa.dot_product_attention`: above all, a fully masked row gives 0
    and not the mean of all values.

    Args:
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.

    Returns:
      The context.

    Raises:
      ValueError: on an unknown implementation; inside, on one that is not jax.nn's.
    """
    backends.chosen(implementation)
    return _PatchJaxNN(_Patch(implementation))

"""The one place for what differs between JAX versions or is not public."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import config, core, sharding_impls, source_info_util, xla_bridge
from jax._src.custom_partitioning_sharding_rule import sdy_sharding_rule_to_mlir, str_to_sdy_sharding_rule
from jax._src.export import _export
from jax._src.interpreters import mlir as internal_mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import hlo
from jax.interpreters import mlir, partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def varying_axes(x) -> frozenset[str]:
    """The manual mesh axes (`shard_map`) over which a value or aval differs."""
    return frozenset(_type(x).manual_axis_type.varying)


def _type(x):
    return x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)


def vary_alike(tree):
    """Marks every array as differing over the manual axes over which any of them does, as JAX's functions do.

    The transpose sums the cotangent of an array over the axes that it did not vary over.
    """
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def summed_like(x, given):
    """The gradient of `given`, summed over the manual axes over which x differs and `given` does not, as JAX's are."""
    axes = tuple(sorted(varying_axes(x) - varying_axes(given)))
    return jax.lax.psum(x, axes) if axes else x


def vary_like_results(fn: Callable, carry):
    """The carry of a loop with body `fn`, differing over all manual axes over which what it becomes does."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry

    def vary(x, axes: frozenset[str]):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    while True:
        leaves: list[Any]
        tree: Any
        leaves, tree = jax.tree.flatten(carry)
        found = [varying_axes(aval) for aval in jax.make_jaxpr(fn)(carry).out_avals]
        if all(axes <= varying_axes(x) for axes, x in zip(found, leaves, strict=True)):
            return carry
        carry = tree.unflatten(map(vary, leaves, found))


def placed(aval, shape, dtype, axes, among):
    """An aval like another one, of this shape and dtype, whose dims lie along these explicit mesh axes of `among`, a tree.

    (Where no mesh is set, an array that is not on one has none in its type, and JAX takes that of the others.)
    """
    mesh = explicit_mesh(among)
    sharding = NamedSharding(aval.sharding.mesh if mesh is None else mesh, PartitionSpec(*axes))
    return aval.update(shape=tuple(shape), dtype=dtype, sharding=sharding, weak_type=False)


def in_program() -> bool:
    """Whether operations become part of a program, as under jit, and do not run at once, as outside of it under grad and vmap."""
    return isinstance(jax.lax.full((1,), 0.0), jax.core.Tracer)


def explicit_mesh(tree):
    """The mesh of the first of a tree of arrays (or avals) whose type has explicit mesh axes; None: there are none."""
    shardings = (getattr(_type(x), "sharding", None) for x in jax.tree.leaves(tree))
    return next((x.mesh for x in shardings if x is not None and x.mesh.explicit_axes), None)


def explicit_axes(x) -> tuple[Any, ...]:
    """The explicit mesh axes of each dim, as in a `PartitionSpec`."""
    spec = () if explicit_mesh(x) is None else tuple(_type(x).sharding.spec)
    return (*spec, *(None,) * (len(x.shape) - len(spec)))


def gathered(x):
    """x whole on every device, where its type says that explicit mesh axes cut it."""
    return x if explicit_mesh(x) is None else jax.reshard(x, PartitionSpec(*(None,) * x.ndim))


def once(axes) -> tuple[Any, ...]:
    """The mesh axes of each dim, None where a dim before has one of them."""
    found: list[Any] = []
    taken: set[str | None] = set()
    for given in axes:
        names = set(given) if isinstance(given, tuple) else {given} - {None}
        found.append(None if names & taken else given)
        taken |= names
    return tuple(found)


def taken(x, index, axes):
    """`x[index]`, whose dims lie along these explicit mesh axes: of a gather, JAX does not find them."""
    mesh = explicit_mesh((x, index))
    return (
        x[index] if mesh is None else x.at[index].get(out_sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    )


def automatic(fn: Callable, arrays, specs: Callable):
    """`fn(arrays)`, a tree of arrays with the mesh axes of `specs(result)`, in which explicit axes are automatic.

    For code that JAX cannot type: `vmap` of loops, gathers.
    """
    mesh = explicit_mesh(arrays)
    if mesh is None:
        return fn(arrays)
    inside = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, jax.sharding.AxisType.Auto))
    with jax.sharding.use_abstract_mesh(inside):
        found = fn(jax.tree.map(gathered, arrays))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.tree.map(lambda x, spec: jax.reshard(x, PartitionSpec(*spec)), found, specs(found))


@contextlib.contextmanager
def allow_promotion():
    """A context (or decorator) in which our own code may broadcast, however strict the caller is about theirs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def matmul_precision() -> str | None:
    """What `jax.default_matmul_precision` says here."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined] # options are made at run time


def _with_dtypes_of(arrays):
    """A context in which arrays may have 64 bits where some of these have.

    `jax.enable_x64` is a setting of the thread and the context that trace a call. Others lower it, and XLA's partitioners ask
    from threads of their own.
    """
    wide = any(x.dtype.itemsize == 8 for x in arrays)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


@contextlib.contextmanager
def plain():
    """A context for our own code in which arrays carry no sharding in their types, whatever mesh the caller set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    with (
        allow_promotion(),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
    ):
        yield


@contextlib.contextmanager
def untyped():
    """`plain`, where what is traced says nothing of the manual axes of a surrounding `shard_map` either."""
    with plain(), config._check_vma(False):
        yield


@contextlib.contextmanager
def eager():
    """A context in which our own code computes at once, whatever transformation or `shard_map` surrounds it."""
    with core.eval_context(), plain():
        yield


def def_lowering(primitive, rule: Callable) -> None:
    mlir.register_lowering(primitive, rule)


def lower_plain(fn, ctx, *args):
    """Lowers a traceable function inside another primitive's lowering rule.

    Shardings and manual axes are types of the surrounding program; inside, everything is local and plain.
    """
    local = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    with plain(), _with_dtypes_of(local):
        return mlir.lower_fun(fn, multiple_results=True)(ctx.replace(avals_in=local), *args)


def lower_manual(fn, ctx, *args):
    """The same of a function that communicates over the manual axes of the surrounding `shard_map`."""
    context = ctx.module_context.axis_context
    manual = context.manual_axes
    types = {name: AxisType.Manual if name in manual else AxisType.Auto for name in context.mesh.axis_names}
    mesh = context.mesh.abstract_mesh.update_axis_types(types)
    sizes = [(name, context.mesh.shape[name]) for name in manual]
    with (
        allow_promotion(),
        jax.sharding.use_abstract_mesh(mesh),
        core.extend_axis_env_nd(sizes),
        config._check_vma(False),
        _with_dtypes_of(ctx.avals_in),
    ):
        whole = NamedSharding(mesh, PartitionSpec())
        local = [jax.core.ShapedArray(aval.shape, aval.dtype, sharding=whole) for aval in ctx.avals_in]
        return mlir.lower_fun(fn, multiple_results=True)(ctx.replace(avals_in=local), *args)


def axis_is_manual(name) -> bool | None:
    """Whether code traced here is local along this mesh axis (inside `shard_map`); None: no such mesh axis is known."""
    mesh = jax.sharding.get_abstract_mesh()
    return name in mesh.manual_axes if name in mesh.axis_names else None


def checks_varying() -> bool:
    """Whether types say over which manual axes values differ (`shard_map(check_vma=True)`)."""
    return config._check_vma.value


def split_devices(ctx) -> int:
    """Over how many devices XLA will split what is lowered: 1 inside `shard_map`, where everything is local."""
    context = ctx.module_context.axis_context
    if isinstance(context, sharding_impls.ShardingContext):
        return context.num_devices
    if isinstance(context, sharding_impls.SPMDAxisContext):
        return int(np.prod([n for axis, n in context.mesh.shape.items() if axis not in context.manual_axes]))
    return 1  # pmap


def for_export(ctx) -> bool:
    return ctx.module_context.lowering_parameters.for_export


def is_manual(ctx) -> bool:
    """Whether what is lowered stands inside `shard_map`."""
    return isinstance(ctx.module_context.axis_context, sharding_impls.SPMDAxisContext)


def digest(jaxpr) -> str:
    """Of a traced program; the same in every process."""
    return hashlib.sha256(re.sub("0x[0-9a-f]+", "", str(jaxpr)).encode()).hexdigest()


def def_dce(primitive, rule: Callable) -> None:
    """`rule(which results are used, equation)` gives which inputs are used, and the equation that is left or None."""
    # Since JAX 0.12 a rule is also told which inputs live on.
    partial_eval.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


# --- custom calls that XLA's partitioners split


def def_partitioner(target: str, found: Callable[[str], Any]) -> None:
    """Has XLA ask `found(backend_config)` how to split a custom call of this target (see `sharding.Split`)."""

    def propagate(sharding, shape, config):
        return sharding

    def partition(arg_shapes, arg_shardings, result_shape, result_sharding, config):
        shardings = result_sharding.tuple_elements() if result_shape.is_tuple() else [result_sharding]
        shapes = [jax.ShapeDtypeStruct(x.dimensions(), x.numpy_dtype()) for x in arg_shapes]
        module, arguments, results = found(config.decode()).split(arg_shardings, shardings, shapes)
        return module, arguments, _packed(result_shape, results)

    def infer(arg_shapes, arg_shardings, result_shape, config):
        return _packed(result_shape, found(config.decode()).infer(arg_shardings))

    register = xla_client.register_custom_call_partitioner
    arguments = (target, propagate, partition, infer)
    register(*arguments, can_side_effecting_have_replicated_sharding=True)
    xla_bridge.register_plugin_callbacks(
        lambda c_api: register(*arguments, can_side_effecting_have_replicated_sharding=True, c_api=c_api)
    )
    guarantee_custom_call(target)


def _packed(shape, shardings):
    return xla_client.HloSharding.tuple_sharding(shape, shardings) if shape.is_tuple() else shardings[0]


def partitioned_call(ctx, target: str, key: str, rule: tuple, *operands):
    """A custom call as `def_partitioner` wants it; `rule` is Shardy's: a string, factors that stay whole, factor sizes."""
    results: list[Any] = [
        ir.RankedTensorType.get(x.shape, mlir.dtype_to_ir_type(x.dtype)) for x in ctx.avals_out
    ]
    call = hlo.CustomCallOp(
        results,
        list(operands),
        call_target_name=ir.StringAttr.get(target),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=mlir.i32_attr(2),
        called_computations=ir.ArrayAttr.get([]),
        backend_config=ir.StringAttr.get(key),
    )
    if config.use_shardy_partitioner.value:
        text, whole, sizes = rule
        factors = str_to_sdy_sharding_rule(text, need_replication_factors=whole, **sizes)
        call.attributes["sdy.sharding_rule"] = sdy_sharding_rule_to_mlir(
            factors, [x.type for x in operands], results
        )
    return call.results


def replicated():
    return xla_client.HloSharding.replicate()


def tiled(devices: np.ndarray):
    """The sharding of an array with one tile for each place along the leading axes; the last holds copies."""
    if devices.shape[-1] == 1:
        return xla_client.HloSharding.subgroup_with_device_ordering(devices[..., 0], [])
    copies = [xla_client.OpSharding.Type.REPLICATED]
    return xla_client.HloSharding.subgroup_with_device_ordering(devices, copies)


def tiles(sharding, ndim: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The numbers of tiles along each dim and of copies, and the devices in that shape."""
    if sharding is None or not sharding.is_tiled():
        return (1,) * ndim, np.zeros((1,) * ndim, np.int64)
    shape = tuple(sharding.tile_assignment_dimensions())
    return shape, np.asarray(sharding.tile_assignment_devices()).reshape(shape)


def device_count(shardings) -> int:
    return max((x.num_devices() for x in shardings if x is not None and x.is_tiled()), default=1)


def local(sharding, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What one device has of an array."""
    numbers = tiles(sharding, len(x.shape))[0]
    return jax.ShapeDtypeStruct([size // n for size, n in zip(x.shape, numbers, strict=False)], x.dtype)


_DEVICES = "jax_fa_devices"  # the one mesh axis of what `local_module` makes


def local_module(fn: Callable, shapes, devices: int, platforms) -> bytes:
    """The program of a function that every one of so many devices runs, on arrays of these shapes."""
    mesh: Any = jax.sharding.AbstractMesh((devices,), (_DEVICES,))
    axes = [(_DEVICES, devices)]
    with plain(), _with_dtypes_of(shapes):  # XLA may ask in the context that compiles, with its mesh
        jaxpr = jax.make_jaxpr(fn, axis_env=axes)(*shapes)
    with plain(), core.extend_axis_env_nd(axes):
        module = internal_mlir.build_mlir_module_helper(
            jaxpr,
            name="jax_fa_local",
            platforms=platforms,
            backend=None,
            axis_context=sharding_impls.SPMDAxisContext(mesh, frozenset({_DEVICES})),
        )
    return mlir.module_to_bytecode(module)


def sum_over(x, groups: list[list[int]]):
    """In `local_module`, the sum over the devices of each group."""
    return jax.lax.psum(x, _DEVICES, axis_index_groups=groups)


def register_ffi_type(name: str, type_: dict[str, Any]) -> None:
    """`jax.ffi.register_ffi_type` for the CPU, at once.

    That one waits for the first client, which then is told of handlers before it is told of the types that they keep, and
    refuses them.
    """
    xla_client._xla.register_custom_type(name, type_)


def guarantee_custom_call(target: str) -> None:
    """Lets `jax.export` serialize programs that call this FFI target, which it does for JAX's own.

    That is a promise: a target's operands, results and attributes keep their meaning, and what changes gets a
    new name. Where JAX has moved its list, `jax.export` asks for its `disabled_checks` instead.
    """
    stable = getattr(_export, "_CUSTOM_CALL_TARGETS_GUARANTEED_STABLE", None)
    if isinstance(stable, set):
        stable.add(target)


def interpreting_gpu() -> bool:
    """Whether Pallas' interpreter of Mosaic GPU kernels is forced here, in which they run on CPU."""
    forced = config.pallas_tpu_interpret_mode_context_manager.value
    return type(forced).__name__ == "InterpretGPUParams"


def has_gpu_interpreter() -> bool:
    """JAX 0.11 and later."""
    from jax.experimental.pallas import mosaic_gpu

    return hasattr(mosaic_gpu, "force_gpu_interpret_mode")


@contextlib.contextmanager
def gpu_interpreter() -> Iterator[None]:
    """Kernels for GPUs run on CPU here, with a race detector; what a failed one leaves behind is cleared."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # see has_gpu_interpreter
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


_one_kernel = threading.Lock()


def interpreted(fn: Callable) -> Callable:
    """A function that runs `fn` through Pallas' interpreter, from wherever it is lowered.

    The interpreter's callbacks are an effect, which rules that lower primitives cannot hold: so it runs in a callback
    of its own, in a thread in which the mode must be forced again. Of a program's kernels that do not depend on one another,
    XLA would run several at once; the interpreter keeps the memory of one.
    """
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # JAX 0.10 has no such mode
    params = config.pallas_tpu_interpret_mode_context_manager.value

    def run(*args):
        with _one_kernel, plgpu.force_gpu_interpret_mode(params):
            return jax.tree.map(np.asarray, jax.jit(fn)(*args))

    def call(*args):
        return jax.pure_callback(run, jax.eval_shape(fn, *args), *args)

    return call


class Frame(NamedTuple):
    file: str
    line: int
    function: str


def frames(equation) -> list[Frame]:
    """Where an equation of a jaxpr was made, innermost first, without JAX's own."""
    found = source_info_util.user_frames(equation.source_info.traceback)
    return [Frame(x.file_name, x.start_line, x.function_name) for x in found]

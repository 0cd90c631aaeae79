"""What runs of the fuzzer have found, made small: each was a bound without an argument, or a fault that is mended."""

# (program, data)
MISSES: dict[str, tuple[dict, dict]] = {
    "small cotangents of parts, divided by the probability to be kept": (
        dict(backend="ascend", B=(1,), Sq=31, Skv=31, N=3, K=3, D=17, Dv=31, dtype="float16")
        | dict(layout="SBND", mask=("band_right", "dense_B1QK"), joined="any", bias="QK")
        | dict(bias_dtype="float16", sinks="N", dropout="traced", derivative="reverse")
        | dict(seed=202001591),
        dict(seed=45, spread=8.0),
    ),
    "sums over parts of the keys that overflow to both sides": (
        dict(backend="cpu", B=(3,), Sq=29, N=15, K=3, D=24, Dv=24, dtype="float16", layout="SBND")
        | dict(cap="traced", mask=("dense_QK", "band_left"), joined="implied", bias="B111")
        | dict(bias_dtype="float16", dropout="known")
        | dict(mapped=("query", "key", "value", "bias", "dropout_key"), mapped_last=True)
        | dict(derivative="second", vmap_outside=False, seed=202001373),
        dict(seed=82, spread=400.0, size=1000.0, infinite_bias=True),
    ),
    "second derivatives of rows whose sink has nearly all of the weight": (
        dict(backend="cpu", B=(1,), Sq=65, Skv=65, N=10, K=2, D=2, Dv=2, layout="SBND")
        | dict(mask=("key_lengths", "dense_B1QK"), sinks="N", scale="traced", derivative="second")
        | dict(seed=202000562),
        dict(seed=87, spread=60.0, infinite_bias=True, garbage="inf"),
    ),
    "cotangents of outputs without the sink, rounded": (
        dict(backend="cpu", B=(), Sq=1, Skv=13, D=64, Dv=64, dtype="float16", layout="NSD")
        | dict(mask=("segments_window", "cumulative_self"), sinks="BN", dropout="known")
        | dict(derivative="second", max_logits=True, seed=202000573),
        dict(seed=3, spread=8.0),
    ),
    "rows of which one key has nearly all of the weight but the sink's": (
        dict(entry="dot_product_attention", backend="ascend", Sq=17, Skv=17, N=3, K=3, D=65, Dv=65)
        | dict(dtype="bfloat16", mask=("dense_QK",), bias_dtype="bfloat16", sinks="BN", scale="known")
        | dict(dropout="known", derivative="reverse", max_logits=True, seed=202000698),
        dict(seed=9, spread=8.0),
    ),
    "tangents that cancel between dropped keys and the sink": (
        dict(backend="cpu", B=(3,), Sq=96, Skv=5, N=3, D=16, Dv=16)
        | dict(mask=("dense_B1QK", "cumulative"), sinks="N", cap="known", dropout="traced")
        | dict(derivative="forward", seed=202000810),
        dict(seed=76, spread=400.0),
    ),
    "second derivatives of dropped keys beside a sink": (
        dict(entry="flash_attention_score", backend="cpu", B=(3,), Sq=96, N=6, K=2, D=65, Dv=16)
        | dict(dtype="bfloat16", layout="BSH", mask=("sparse_3",), bias_dtype="bfloat16", sinks="N")
        | dict(scale="known", dropout="bits", derivative="second", seed=202000868),
        dict(seed=50, spread=60.0, size=1000.0),
    ),
    "small gradients of parts on devices": (
        dict(backend="cpu", B=(), Sq=96, Skv=6, N=6, K=3, D=65, Dv=65, dtype="float16")
        | dict(layout="NSD", mask=("cumulative_window",), joined="not all", sinks="BN", scale="known")
        | dict(cap="known", derivative="reverse", how="sharded", seed=404000607),
        dict(seed=2, spread=400.0, size=0.0001, infinite_bias=True, garbage="-inf", visible_garbage=True),
    ),
    "tangents of cotangents of parts, rounded": (
        dict(backend="cpu", B=(), Sq=97, Skv=97, K=2, D=5, Dv=3, dtype="float16", layout="NSD")
        | dict(mask=("cumulative_window",), joined="not all", sinks="BN", derivative="second")
        | dict(seed=404000713),
        dict(seed=11, spread=60.0, size=0.0001, garbage="1e-40"),
    ),
    "small outputs of parts": (
        dict(backend="cpu", Sq=129, Skv=8, N=3, D=80, Dv=5, dtype="float16", scale="traced")
        | dict(dropout="known", derivative="forward", how="sharded", seed=404001184),
        dict(seed=27, spread=8.0, size=0.0001),
    ),
    "outputs of parts, larger than that of all": (
        dict(backend="ascend", Sq=95, Skv=17, N=3, D=2, Dv=16, dtype="float16")
        | dict(mask=("causal_bottom", "dense_QK", "prefix"), joined="implied", bias_dtype="float16")
        | dict(derivative="reverse", seed=404000788),
        dict(seed=127, spread=8.0),
    ),
    "gradients of parts of the keys that overflow to both sides": (
        dict(backend="cpu", B=(), Sq=8, Skv=8, N=6, K=3, D=130, Dv=130, dtype="float16")
        | dict(bias_dtype="float16", mask=("dense_BNQK", "cumulative_self"), joined="implied")
        | dict(sinks="N", cap="traced", derivative="second", seed=202000253),
        dict(seed=58, spread=60.0, size=1000.0, garbage="3e38"),
    ),
    "both halves of a gradient, each rounded": (
        dict(backend="cpu", B=(), Sq=1, Skv=16, N=1, D=1, Dv=1, dtype="float16", how="doubled")
        | dict(derivative="reverse", seed=404000172),
        dict(seed=4, spread=60.0, size=0.0001),
    ),
    "the gradients of parts of the keys, each rounded": (
        dict(backend="cpu", B=(), Sq=33, Skv=33, K=2, D=32, Dv=32, dtype="float16", layout="SND")
        | dict(bias="B111", mask=("dense_bNQK", "causal_bottom", "dense_1"), joined="not all")
        | dict(scale="traced", derivative="reverse", seed=404000164),
        dict(seed=20, spread=60.0),
    ),
    "the gradients of devices, each rounded": (
        dict(backend="xla", B=(), Sq=64, Skv=64, N=1, D=2, Dv=80, dtype="bfloat16")
        | dict(mask=("prefix",), bias="bNQK", slopes="BN", cap="traced", dropout="known")
        | dict(derivative="reverse", how="sharded", seed=202000334),
        dict(seed=122, spread=60.0, size=1000.0, infinite_bias=True),
    ),
    "small outputs that are divided by the probability to be kept": (
        dict(entry="dot_product_attention", backend="ascend", Sq=64, Skv=64, N=1, D=32, Dv=32)
        | dict(dtype="float16", mask=("dense_QK",), known_mask=True, bias="BNQK")
        | dict(bias_dtype="float16", scale="known", dropout="traced", max_logits=True, seed=202000447),
        dict(seed=1),
    ),
    "tangents of parts by the distance of rounded outputs": (
        dict(backend="cpu", B=(), Sq=48, Skv=18, K=2, D=64, Dv=80, dtype="bfloat16", how="sharded")
        | dict(derivative="forward", seed=202000164),
        dict(seed=1, spread=8.0, garbage="inf"),
    ),
    "parts of a gradient that overflow to both sides": (
        dict(backend="xla", B=(2, 2), Sq=3, N=9, K=3, D=17, Dv=3, dtype="float16", layout="BNSD")
        | dict(Skv=5, mask=("cumulative_causal",), slopes="N", sinks="N", cap="traced")
        | dict(dropout="known", derivative="second", mapped=("alibi_slopes", "mask", "dropout_key"))
        | dict(vmap_outside=False, seed=2252000047),
        dict(seed=35, spread=400.0, size=1000.0),
    ),
    "weights rounded before they are divided by the probability to be kept": (
        dict(backend="xla", B=(), Sq=191, Skv=15, N=1, D=1, Dv=1, dtype="float16", dropout="known")
        | dict(seed=2252000071),
        dict(seed=15, spread=8.0),
    ),
    "second derivatives with sinks in 16 bits": (
        dict(backend="cpu", B=(), Skv=5, N=15, K=3, D=3, Dv=3, dtype="float16", layout="SND")
        | dict(sinks="BN", mask=("cumulative_self",), known_mask=True, scale="traced")
        | dict(dropout="traced", derivative="second")
        | dict(mapped=("value", "sinks", "scale", "dropout_key"), seed=2252000256),
        dict(seed=58, size=1000.0),
    ),
    "products below the normal numbers": (
        dict(entry="dot_product_attention", backend="xla", B=(3,), Sq=15, Skv=47, N=1, D=31, Dv=31)
        | dict(bias="1", scale="known", derivative="second", seed=2252000253),
        dict(seed=8, spread=400.0, size=0.0001),
    ),
    "a sink with nearly all of the weight": (
        dict(backend="cpu", B=(2, 2), Sq=3, Skv=3, N=15, K=3, D=65, Dv=65, dtype="bfloat16")
        | dict(slopes="BN", sinks="N", scale="known", derivative="forward", seed=2252000288),
        dict(seed=0, spread=60.0),
    ),
    "the share of a sink in merged parts": (
        dict(backend="cpu", Sq=6, Skv=6, K=2, D=1, Dv=1, mask=("dense_QK",), bias="bNQK")
        | dict(slopes="N", sinks="N", derivative="reverse", how="sharded", seed=156000005),
        dict(seed=626, spread=60.0),
    ),
    "a sink whose tangent cancels those of the keys": (
        dict(backend="cpu", B=(1,), Sq=8, Skv=8, N=9, K=3, D=15, Dv=80, dtype="float16")
        | dict(layout="SBND", bias="BNQ1", mask=("dense_bNQK", "cumulative_window", "window_bottom"))
        | dict(sinks="N", cap="known", derivative="forward", how="sharded", seed=5224000003),
        dict(seed=2, spread=0.01),
    ),
    "a dropped key in merged parts": (
        dict(backend="cpu", B=(3,), Skv=5, D=100, Dv=100, mask=("window",), joined="not all")
        | dict(bias="BNQK", sinks="BN", scale="known", dropout="known", derivative="reverse")
        | dict(seed=5224000010),
        dict(seed=232, spread=60.0),
    ),
    "the cotangent of a part's output, below the normal numbers": (
        dict(backend="cpu", B=(), Sq=14, Skv=129, N=1, D=18, Dv=2, dtype="float16")
        | dict(bias_dtype="float16", mask=("window_bottom",), joined="not all", derivative="reverse")
        | dict(seed=148530000010),
        dict(seed=19, spread=8.0, size=0.0001),
    ),
    "weights of 16 bits times the scale of a value": (
        dict(entry="paged_attention", backend="xla", B=(3,), Sq=3, Skv=16, K=2, D=1, Dv=40)
        | dict(dtype="float16", mask=("pages_16", "key_lengths", "causal_bottom"), pages="int8")
        | dict(page_scales=True, seed=5224000014),
        dict(seed=11, spread=60.0, size=1000.0),
    ),
    "an infinite cotangent of a masked row": (
        dict(entry="flash_attention_score", backend="cpu", B=(1,), Sq=1, Skv=1, N=1, D=1, Dv=1)
        | dict(sinks="N", mask=("sparse_0", "dense_B1QK"), derivative="reverse", how="npu_grad")
        | dict(seed=5222000009),
        dict(seed=1, garbage="-inf"),
    ),
    "small gradients of logits, which a scale makes smaller before they are rounded": (
        dict(entry="dot_product_attention", backend="mosaic", Sq=17, Skv=17, N=1, D=192, Dv=192)
        | dict(dtype="float16", mask=("lengths",), scale="traced", dropout="known", derivative="reverse")
        | dict(seed=904495611),
        dict(seed=0, size=0.0001),
    ),
}

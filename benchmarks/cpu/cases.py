"""What is measured: the calls, by group, each with the call of ours that its rate is a fraction of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

DTYPES = ("float32", "bfloat16", "float16")
# How many products a direction computes, in units of the forward's two, and ours that it is measured beside.
PRODUCTS = {"forward": 1.0, "backward": 2.5, "jvp": 3.0, "hvp": 8.5, "double backward": 6.0}
BESIDE = {"jvp": "forward", "hvp": "backward", "double backward": "backward"}
PACKED = (1500, 1000, 800, 500, 296)  # lengths of packed sequences


@dataclass(frozen=True, kw_only=True)
class Case:
    group: str
    B: int = 1
    Sq: int = 4096
    Skv: int = 0  # 0: Sq
    N: int = 8
    K: int = 0  # 0: N
    D: int = 64
    dtype: str = "float32"
    mask: str = "full"  # or causal, window WIDTH, packed
    extra: str = ""  # see programs.py
    chain: int = 1  # calls of a program, each with the result of the one before: as layers of a model
    peers: tuple[str, ...] = ()
    derivatives: bool = False  # along tangents and of second order, in place of forward and backward
    forward_only: bool = False
    of: "Case | None" = None

    @property
    def keys(self) -> int:
        return self.Skv or self.Sq

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key."""
        if self.mask == "causal":
            return self.Sq * (self.Sq + 1) / 2
        if self.mask.startswith("window"):
            width = int(self.mask.split()[1])
            return float(sum(min(i + 1, width) for i in range(self.Sq)))
        if self.mask == "packed":
            return float(sum(length**2 for length in PACKED))
        return float(self.Sq) * self.keys

    def flops(self, direction: str) -> float:
        """Multiply-adds of the visible pairs, counted as two operations each."""
        return 4.0 * self.chain * self.B * self.N * self.D * self.pairs * PRODUCTS[direction]

    @property
    def key_elements(self) -> int:
        """Of key and value together."""
        return 2 * self.B * self.keys * (self.K or self.N) * self.D

    @property
    def name(self) -> str:
        lengths = f"S={self.Sq}" if self.keys == self.Sq else f"{self.Sq}x{self.keys}"
        heads = f" {self.N}:{self.K}" if self.K else ""
        batch = f" B={self.B}" if self.B > 1 else ""
        extra = f" {self.extra}" if self.extra else ""
        return f"{lengths}{batch}{heads} D={self.D} {self.dtype} {self.mask}{extra}"


def cases() -> list[Case]:
    groups = (_long(), _short(), _decode(), _prefill(), _extras(), _derivatives(), _tiny())
    return [case for group in groups for case in group]


def _long() -> Iterator[Case]:
    """Where the products are all that counts. 16-bit ones beside those of float32."""
    for dtype in DTYPES:
        for D in (64, 128):
            for mask in ("full", "causal"):
                peers = ("torch", "jax.nn", *(["xla"] if (D, mask) == (64, "causal") else []))
                case = Case(group="long", D=D, mask=mask, dtype=dtype, peers=peers)
                yield case if dtype == "float32" else replace(case, of=replace(case, dtype="float32"))


def _short() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for mask in ("full", "causal"):
            whole = Case(group="long", mask=mask, dtype=dtype)
            for S in (128, 256, 512, 1024):
                chain = max(1, 1024 // S)
                yield replace(whole, group="short", Sq=S, chain=chain, of=whole, peers=("torch", "jax.nn"))
            yield replace(whole, group="short", Sq=128, B=64, of=whole, peers=("torch", "jax.nn"))


def _decode() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case(group="decode", Sq=1, Skv=32768, D=128, dtype=dtype, forward_only=True)
        for N, K, lengths in ((32, 8, (1, 4)), (8, 0, (1, 2, 4, 8, 16)), (32, 1, (1,))):
            for Sq in lengths:
                peers = ("torch", "jax.nn") if Sq == 1 else ()
                yield replace(base, Sq=Sq, N=N, K=K, peers=peers)
        yield replace(base, N=32, K=8, D=100)


def _prefill() -> Iterator[Case]:
    """A chunk of a prompt against a cache."""
    for dtype in ("float32", "bfloat16"):
        whole = Case(group="long", D=128, dtype=dtype, forward_only=True)
        yield replace(whole, group="prefill", Sq=256, Skv=8192, of=whole, peers=("torch", "jax.nn"))


def _extras() -> Iterator[Case]:
    plain = Case(group="extras", B=2, Sq=2048)
    extras = (
        "mask",
        "bias over batch",
        "bias over heads",
        "learnt bias over batch",
        "learnt bias over heads",
    )
    for extra in (*extras, "learnt bias", "dropout", "soft cap"):
        yield replace(plain, extra=extra, of=plain)
    long = Case(group="extras")
    yield replace(long, Sq=16384, mask="window 512", of=long)
    yield replace(long, mask="packed", of=long)
    yield replace(long, mask="causal", K=2, of=replace(long, mask="causal"))


def _derivatives() -> Iterator[Case]:
    for D, mask in ((64, "causal"), (128, "full")):
        yield Case(group="derivatives", D=D, mask=mask, derivatives=True, peers=("jax.nn",))


def _tiny() -> Iterator[Case]:
    """As windows of vision models are: what a call costs for each entry."""
    yield Case(group="tiny", B=131072, Sq=4, N=1, D=8, extra="learnt bias", peers=("torch", "jax.nn"))

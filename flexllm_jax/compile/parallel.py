"""Dependent parallelization (FlexLLM, section 4): how bypasses are sharded beside a sharded model.

The base model is given: Megatron-style, q, k, v, gate and up split by columns (input replicated,
output partitioned), o and down by rows (input partitioned, output pre-reduce: partial sums that an
all-reduce joins). For every bypass all states of its weights and of its intermediate are
enumerated, those that do not compose are refused, and the rest are ordered by what they cost: bytes
moved by collectives of their own, then FLOPs, then bytes that a device holds and gradient bytes
once per optimizer step. A collective stops all devices, so no FLOPs of a bypass pay for one.
"""

import itertools
from dataclasses import dataclass, field
from enum import Enum

from flexllm_jax.compile.mesh import Mesh, ParallelError
from flexllm_jax.models.config import ModelConfig

ROW_PARALLEL = ("o", "out", "down")
# Of what tokens have for single layers: so narrow that an all-reduce would cost more than all of it
# on every device.
REPLICATED = ("token_gate", "token_projection")
# Of one device in a ring of n, times the tensor's bytes over n.
_RING = {
    "all-reduce": lambda n: 2 * (n - 1),
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: n - 1,
    "broadcast": lambda n: n,
}
_WEIGHT_BYTES = 16  # of a trained weight: float32 master, gradient and both of AdamW's moments


class State(Enum):
    """What a device holds of a tensor."""

    NON_PARALLEL = "non-parallel"  # one device holds all of it, the others nothing
    PARTITIONED = "partitioned"  # each its own part
    REPLICATED = "replicated"  # each all of it
    PRE_REDUCE = "pre-reduce"  # each a summand of it


N, P, R, S = State.NON_PARALLEL, State.PARTITIONED, State.REPLICATED, State.PRE_REDUCE


class Split(Enum):
    """What a device holds of a weight matrix."""

    ONE_DEVICE = "non-parallel"
    WHOLE = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Join:
    """Where a bypass Y += f(X A) B reads and adds: states of X [T, d_in] and Y [T, d_out] as the
    base model has them there, and over how many devices Y is partitioned."""

    site: str
    d_in: int
    d_out: int
    x: State
    y: State
    parts: int
    linear: bool = True


@dataclass(frozen=True)
class Move:
    """A collective of the bypass's own: which, on what, bytes a device sends."""

    collective: str
    tensor: str
    bytes: int


@dataclass(frozen=True)
class Candidate:
    """One way to shard a low-rank bypass, and its cost on each device.

    a, b: splits of A [d_in, R] and B [R, d_out]. computed: state of X A; used: the state in which B
    reads it. moves: collectives of a forward (the backward has their adjoints, which move as much).
    flops: of a forward. memory: bytes of weights, gradients and optimizer state. summed: of which
    weights the gradients are pre-reduce, so that an optimizer step adds them up; gradient_bytes
    is what that moves, once per step.
    """

    a: Split
    b: Split
    computed: State
    used: State
    y: State
    moves: tuple[Move, ...]
    flops: int
    memory: int
    summed: tuple[str, ...]
    gradient_bytes: int

    @property
    def bytes(self) -> int:
        """Moved by collectives of its own in a forward."""
        return sum(move.bytes for move in self.moves)

    @property
    def cost(self) -> tuple[int, int, int, int]:
        """What candidates are ordered by."""
        return self.bytes, self.flops, self.memory, self.gradient_bytes

    def describe(self) -> str:
        """One line."""
        middle = self.computed.value
        if self.used is not self.computed:
            middle += f" -> {self.used.value}"
        moves = ", ".join(f"{m.collective} of {m.tensor}" for m in self.moves) or "no collective"
        return (
            f"A {self.a.value}, X A {middle}, B {self.b.value}: {moves}, {self.bytes:,} bytes "
            f"moved, {self.flops / 1e6:,.1f} MFLOP, {self.memory:,} bytes held, "
            f"{self.gradient_bytes:,} gradient bytes per optimizer step"
        )


@dataclass(frozen=True)
class SitePlan:
    """The best candidate of a bypass, the others by cost, and why combinations were refused."""

    join: Join
    chosen: Candidate
    others: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]

    def describe(self, alternatives: int = 3) -> str:
        """The choice and the next best, a line each."""
        j = self.join
        lines = [f"{j.site}: X {j.x.value}, Y {j.y.value}", f"  takes {self.chosen.describe()}"]
        lines += [f"  not   {other.describe()}" for other in self.others[:alternatives]]
        more = len(self.others) - alternatives
        lines.append(f"  and {max(more, 0)} dearer ones; {len(self.refused)} do not compose")
        return "\n".join(lines)


def _multiply(x: State, w: Split) -> tuple[State | None, str]:
    """State of a product from those of its factors (None: why they do not compose)."""
    if w is Split.ONE_DEVICE:
        if x in (R, N):
            return N, ""
        return None, f"one device cannot read an input that is {x.value}"
    if x is N:
        return None, "the other devices hold nothing to multiply"
    if x is R:
        return {Split.WHOLE: R, Split.ROWS: S, Split.COLUMNS: P}[w], ""
    if x is P:
        if w is Split.COLUMNS:
            return None, "columns need the whole input, which is partitioned"
        return S, ""  # a replicated weight gives its own rows
    if w is Split.WHOLE:
        return S, ""
    return None, f"partial sums times {w.value} would be partial and partitioned at once"


# From a state to another: the collective that does it, or None where it costs nothing.
_CHANGES: dict[tuple[State, State], str | None] = {
    (R, P): None,  # a slice
    (R, S): None,  # one device adds it
    (P, S): None,  # in its own columns, zeros elsewhere
    (N, S): None,
    (S, R): "all-reduce",
    (S, P): "reduce-scatter",
    (P, R): "all-gather",
    (N, R): "broadcast",
}


def _change(before: State, after: State) -> str | None:
    """KeyError when nobody would want that."""
    return None if before is after else _CHANGES[before, after]


def candidates(
    join: Join, rank: int, tokens: int, tp: int, itemsize: int
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """All ways to shard a bypass that compose, by cost, and (combination, why not) of the others.

    Args:
        join: where it reads and adds.
        rank: R.
        tokens: T of a forward.
        tp: devices.
        itemsize: bytes of an activation.
    """
    found, refused = [], []
    for a, b, used in itertools.product(Split, Split, State):
        name = f"A {a.value}, B {b.value}, X A {used.value}"
        computed, reason = _multiply(join.x, a)
        if computed is None:
            refused.append((name, reason))
            continue
        if computed is not used and (computed, used) not in _CHANGES:
            refused.append((name, f"{computed.value} does not become {used.value}"))
            continue
        if not join.linear and (computed is S and used is S):
            refused.append((name, "a nonlinear function of partial sums is not a sum"))
            continue
        y, reason = _multiply(used, b)
        if y is None:
            refused.append((name, reason))
            continue
        if y is not join.y and (y, join.y) not in _CHANGES:
            refused.append((name, f"{y.value} does not add to a {join.y.value} output"))
            continue
        found.append(_cost(join, a, b, computed, used, y, rank, tokens, tp, itemsize))
    return sorted(found, key=lambda one: one.cost), refused


def _cost(join, a, b, computed, used, y, rank, tokens, tp, itemsize) -> Candidate:
    moves = []
    for before, after, tensor, width in (
        (computed, used, "X A", rank),
        (y, join.y, "Y", join.d_out),
    ):
        if (collective := _change(before, after)) is not None:
            size = tokens * width * itemsize
            moves.append(Move(collective, tensor, _RING[collective](tp) * size // tp))
    # A device's share of each product's FLOPs: whoever holds part of a factor does part of it. (Of
    # a product on one device, that device's.)
    shares_a = tp if computed is P or (computed is S) else 1
    parts_b = join.parts if join.y is P else tp
    shares_b = {Split.ROWS: tp, Split.COLUMNS: parts_b}.get(b, 1)
    if b is Split.WHOLE and used is P:
        shares_b = tp
    if b is Split.WHOLE and used is R and join.y is P:
        shares_b = parts_b  # only the columns that it keeps
    weights = {"a": join.d_in * rank, "b": rank * join.d_out}
    held_a = weights["a"] // (tp if a in (Split.ROWS, Split.COLUMNS) else 1)
    held_b = weights["b"] // {Split.ROWS: tp, Split.COLUMNS: parts_b}.get(b, 1)
    # Factors and gradients that are replicated give the same gradient of a weight everywhere.
    same_b = used is R and b is Split.WHOLE and join.y is R
    summed = []
    if a is Split.WHOLE and not (computed is R and same_b):
        summed.append("a")
    # k and v: when a part is held by several devices, each sees only its own queries.
    shared_part = b is Split.COLUMNS and parts_b < tp
    if (b is Split.WHOLE and not same_b) or shared_part:
        summed.append("b")
    held = {"a": held_a, "b": held_b}
    return Candidate(
        a=a,
        b=b,
        computed=computed,
        used=used,
        y=y,
        moves=tuple(moves),
        flops=2 * tokens * (weights["a"] // shares_a + weights["b"] // shares_b),
        memory=(held_a + held_b) * (itemsize + _WEIGHT_BYTES),
        summed=tuple(summed),
        gradient_bytes=sum(_RING["all-reduce"](tp) * held[w] * 4 // tp for w in summed),
    )


def joins(model: ModelConfig, mesh: Mesh, sites: tuple[str, ...]) -> list[Join]:
    """Where the low-rank bypasses of these sites meet the base model: LoRA on projections (by
    their short names), and bottlenecks, which read and add to outputs after the all-reduce."""
    found = []
    for site in sites:
        if site.startswith("bottleneck_"):
            d = model.d_model
            found.append(Join(site, d, d, R, R, mesh.tp, linear=False))
            continue
        states = (P, S) if site in ROW_PARALLEL else (R, R if site in REPLICATED else P)
        parts = mesh.kv if site in ("k", "v") else mesh.tp
        found.append(Join(site, *model.projections[site], *states, parts))
    return found


@dataclass(frozen=True)
class WeightPlan:
    """How one weight of a bypass lies on the mesh: which dimension is partitioned (None: each
    device holds it all), over the `kv` devices alone or over all, and whether its gradient is
    summed over the devices that hold the same part."""

    dimension: int | None
    kv_only: bool = False
    summed: bool = False


@dataclass(frozen=True)
class ParallelPlan:
    """How every bypass is sharded: site -> name -> `WeightPlan`; and the searches behind it."""

    mesh: Mesh
    weights: dict[str, dict[str, WeightPlan]]
    searches: tuple[SitePlan, ...] = field(default=())

    def describe(self) -> str:
        """The plan, for a person to read."""
        m = self.mesh
        lines = [
            f"tensor parallel over {m.tp} devices: "
            + (
                f"keys and values over {m.kv}, each head on {m.replicas}"
                if m.replicas > 1
                else "keys and values too"
            )
        ]
        lines += [search.describe() for search in self.searches]
        searched = {search.join.site for search in self.searches}
        for site in sorted(set(self.weights) - searched):
            lines.append(f"{site}: partitioned as what it changes, no collective")
        return "\n".join(lines)


def plan_parallel(
    model: ModelConfig,
    mesh: Mesh,
    sites: tuple[str, ...],
    *,
    rank: int,
    bottleneck: int = 64,
    tokens: int = 1024,
    itemsize: int = 2,
) -> ParallelPlan:
    """Choose how the bypasses of `sites` (as in `BankShape.sites`) are sharded.

    What acts element by element or head by head (IA3, prefixes) is partitioned as the activations
    that it changes: nothing to search. `tokens`: T of the forward that is costed.
    """
    weights: dict[str, dict[str, WeightPlan]] = {}
    searches = []
    searched = tuple(s for s in sites if s in model.projections or s.startswith("bottleneck_"))
    for join in joins(model, mesh, searched):
        size = rank if join.linear else bottleneck
        best, *others = (found := candidates(join, size, tokens, mesh.tp, itemsize))[0]
        searches.append(SitePlan(join, best, tuple(others), tuple(found[1])))
        if best.moves:
            raise ParallelError(f"{join.site}: no sharding without a collective of its own")
        dimensions = {Split.ROWS: 0, Split.COLUMNS: 1, Split.WHOLE: None}
        own = {
            name: WeightPlan(
                dimensions[split],
                kv_only=name == "b" and split is Split.COLUMNS and join.parts < mesh.tp,
                summed=name in best.summed,
            )
            for name, split in (("a", best.a), ("b", best.b))
        }
        if not join.linear:
            down, up = own["a"], own["b"]
            own = {"down": down, "up": up, "down_bias": down, "up_bias": up}
        weights[join.site] = own
    by_kv_head = WeightPlan(0, kv_only=True, summed=mesh.replicas > 1)
    for site in sites:
        if site in ("ia3_k", "ia3_v"):
            weights[site] = {"scale": by_kv_head}
        elif site == "ia3_inner":
            weights[site] = {"scale": WeightPlan(0)}
        elif site == "prefix":
            heads = WeightPlan(1, kv_only=True, summed=mesh.replicas > 1)
            weights[site] = {"k": heads, "v": heads}
    return ParallelPlan(mesh, weights, tuple(searches))

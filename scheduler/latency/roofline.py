"""Step times from data sheets: a latency model for a device and a model that nobody has timed.

A forward program of T tokens does 2 FLOP per parameter and token and reads every weight once; which
of the two takes longer decides, softly (a p-norm), as neither overlaps the other wholly. What the
device reaches of its data sheet is in `Efficiency`: with the default, cautious guesses it starts a
cold engine; calibrated on measurements it drives the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from scheduler.latency.model import LatencyModel


@dataclass(frozen=True)
class DeviceSpec:
    """A device's data sheet: dense bfloat16 FLOP/s, memory bytes/s, and bytes/s of the link to the
    other devices of a tensor-parallel group (one direction)."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    memory_bytes: float


@dataclass(frozen=True)
class LayerCost:
    """A layer's sizes. own_keys: whether it writes keys and values, or reads those of another.
    window: most keys that a query sees. gate: whether its output has a gate, as wide as it is."""

    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    own_keys: bool = True
    window: int | None = None
    gate: bool = False

    # Of recurrent states, what `DeltaCost` has.
    state_bytes: ClassVar[int] = 0
    state_flops: ClassVar[int] = 0
    state_backward_flops: ClassVar[int] = 0

    @property
    def queries(self) -> int:
        """Width of its queries, and of what it returns."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys that it reads."""
        return self.kv_heads * self.head_dim

    @property
    def mixer_widths(self) -> tuple[int, ...]:
        """What the projections before attention write."""
        return (self.queries * (2 if self.gate else 1), *[self.keys] * (2 * self.own_keys))

    @property
    def inner(self) -> int:
        """What the projection behind attention reads."""
        return self.queries


@dataclass(frozen=True)
class DeltaCost:
    """A layer's sizes whose mixer is a gated delta net: no keys, but a state of each sequence, a
    float32 matrix for each value head."""

    ffn: int
    key_heads: int
    value_heads: int
    key_dim: int = 128
    value_dim: int = 128

    # Of attention.
    queries: ClassVar[int] = 0
    keys: ClassVar[int] = 0
    window: ClassVar[None] = None

    @property
    def mixer_widths(self) -> tuple[int, ...]:
        """What its projections write: queries, keys and values in one; the gate; beta; decay."""
        channels = 2 * self.key_heads * self.key_dim + self.inner
        return (channels, self.inner, self.value_heads, self.value_heads)

    @property
    def inner(self) -> int:
        """What the projection behind the rule reads."""
        return self.value_heads * self.value_dim

    @property
    def state_bytes(self) -> int:
        """Of one sequence."""
        return 4 * self.value_heads * self.key_dim * self.value_dim

    @property
    def state_flops(self) -> int:
        """Of a chunk's token: three products with the state, and four, two of each width, with the
        half of its chunk that is before it."""
        a_head = 6 * self.key_dim * self.value_dim + 2 * _CHUNK * (self.key_dim + self.value_dim)
        return self.value_heads * a_head

    @property
    def state_backward_flops(self) -> int:
        """The same of the backward: two products with the state that are the forward's, ten for the
        gradients; of the half chunk five of values' width and eight of keys'."""
        a_head = 24 * self.key_dim * self.value_dim
        a_head += _CHUNK * (8 * self.key_dim + 5 * self.value_dim)
        return self.value_heads * a_head


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a decoder that its costs follow from."""

    name: str
    d_model: int
    by_layer: tuple[LayerCost | DeltaCost, ...]
    vocab: int
    dtype_bytes: int = 2

    @classmethod
    def alike(
        cls,
        name: str,
        layers: int,
        d_model: int,
        ffn: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
    ) -> ModelCost:
        """All layers with full attention."""
        return cls(name, d_model, (LayerCost(ffn, heads, kv_heads, head_dim),) * layers, vocab)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.by_layer)

    @classmethod
    def hybrid(
        cls,
        name: str,
        layers: int,
        d_model: int,
        attention: LayerCost,
        delta: DeltaCost,
        vocab: int,
    ) -> ModelCost:
        """The last of each four layers attends."""
        return cls(name, d_model, (*[delta] * 3, attention) * (layers // 4), vocab)

    def total(self, of_layer: Callable[[LayerCost | DeltaCost], float]) -> float:
        """Of all layers."""
        return sum(map(of_layer, self.by_layer))

    def projections(self, layer: LayerCost | DeltaCost) -> list[tuple[int, int]]:
        """Widths, in and out, of a layer's projections."""
        d = self.d_model
        into = [(d, width) for width in (*layer.mixer_widths, layer.ffn, layer.ffn)]
        return [*into, (layer.inner, d), (layer.ffn, d)]

    @property
    def layer_parameters(self) -> float:
        """Parameters of a layer's projections, in the mean."""

        def parameters(layer: LayerCost | DeltaCost) -> int:
            return sum(d_in * d_out for d_in, d_out in self.projections(layer))

        return self.total(parameters) / self.layers

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.vocab * self.d_model

    @property
    def streamed_bytes(self) -> float:
        """Bytes of the weights that a forward reads: all but the embedding table."""
        return self.dtype_bytes * (self.layers * self.layer_parameters + self.head_parameters)

    @property
    def kv_bytes(self) -> float:
        """Bytes of one token's keys and values as all layers read them."""
        return 2 * self.total(lambda layer: layer.keys) * self.dtype_bytes

    @property
    def windows(self) -> tuple[tuple[float, int], ...]:
        """As of `windows.KeyReads`."""
        shares: dict[int, float] = {}
        for layer in self.by_layer:
            if layer.window is not None:
                shares[layer.window] = shares.get(layer.window, 0.0) + layer.keys
        total = self.total(lambda layer: layer.keys)
        return tuple((share / total, window) for window, share in shares.items())


@dataclass(frozen=True)
class Efficiency:
    """What a system makes of its device.

    compute, memory   shares of the data sheet that large products and streams reach
    sharpness         p of the p-norm between computing and reading weights
    step_s            seconds of every step besides: launches, sampling, the host where it shows
    unit_s            the same for a backward unit
    all_reduce_s      seconds of an all-reduce of nothing
    recompute         of a backward unit: share of the forward that is done again
    """

    compute: float = 0.5
    memory: float = 0.7
    sharpness: float = 4.0
    step_s: float = 1e-3
    unit_s: float = 1e-4
    all_reduce_s: float = 2e-5
    recompute: float = 0.0
    attention: float | None = None
    adapter_passes: float = 0.0
    unit_passes: float = 0.0


# What this engine reached with Llama-3.1-8B on an H100 (docs/results/gpu).
MEASURED = Efficiency(
    compute=0.58,
    memory=0.92,
    step_s=2.5e-3,
    unit_s=2e-5,
    attention=0.29,
    adapter_passes=21.0,
    unit_passes=25.0,
)

A100 = DeviceSpec("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 300e9, 80e9)
H100 = DeviceSpec("NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 450e9, 80e9)
H200 = DeviceSpec("NVIDIA H200", 989e12, 4.8e12, 450e9, 141e9)
CPU = DeviceSpec("cpu", 60e9, 10e9, 1e9, 8e9)  # a guess for a few cores in float32
DEVICES = {device.name: device for device in (A100, H100, H200, CPU)}

LLAMA_3_1_8B = ModelCost.alike("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_3_1_70B = ModelCost.alike("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256)
QWEN2_5_14B = ModelCost.alike("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064)
QWEN2_5_32B = ModelCost.alike("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064)
_OF_QWEN3_5 = {"kv_heads": 4, "head_dim": 256, "gate": True}
QWEN3_5_4B, QWEN3_5_9B, QWEN3_5_27B = (
    ModelCost.hybrid(
        f"Qwen3.5-{size}",
        layers,
        d_model,
        LayerCost(ffn, heads, **_OF_QWEN3_5),
        DeltaCost(ffn, 16, values),
        248320,
    )
    for size, layers, d_model, ffn, heads, values in (
        ("4B", 32, 2560, 9216, 16, 32),
        ("9B", 32, 4096, 12288, 16, 32),
        ("27B", 64, 5120, 17408, 24, 48),
    )
)
MODELS = {
    m.name: m
    for m in (
        *(LLAMA_3_1_8B, LLAMA_3_1_70B, QWEN2_5_14B, QWEN2_5_32B),
        *(QWEN3_5_4B, QWEN3_5_9B, QWEN3_5_27B),
    )
}

# Over a row of logits. The noise of draws is no pass but about 100 operations for each logit, which
# take as long as 8; the searches of top-k and top-p have 16 passes each.
_PASSES = {"adjusted_rows": 4, "drawn_rows": 8, "filtered_rows": 36, "logprob_rows": 10}
_CHUNK = 64  # tokens that a gated delta net takes at once
_COLD_SPREAD = 1.0  # how far off a data sheet may be before anything is measured


def find_device(kind: str) -> DeviceSpec:
    """The data sheet of a device kind as JAX names it. ValueError lists those that are known."""
    if kind not in DEVICES:
        raise ValueError(
            f"scheduler.latency=roofline has no data sheet of {kind!r}, only of "
            f"{', '.join(DEVICES)}: use scheduler.latency=profile"
        )
    return DEVICES[kind]


def roofline(
    device: DeviceSpec,
    model: ModelCost,
    buckets: Iterable[int],
    unit_tokens: int,
    *,
    tp: int = 1,
    rank: int = 16,
    efficiency: Efficiency | None = None,
    spread: float = _COLD_SPREAD,
) -> LatencyModel:
    """The latency model of `model` on `tp` devices.

    Args:
        buckets: token slots of the forward programs.
        unit_tokens: U, tokens of a backward unit.
        rank: of the adapters, on every projection.
        spread: see `LatencyModel`.

    The terms, per device (1/tp of the weights and heads), with C = compute x FLOP/s and
    M = memory x bytes/s:

        base[T]          step_s + ((2 T P / C)^p + (weight bytes / M)^p)^(1/p) + all-reduces of T
        decode_kv        KV bytes of a token / M
        chunk_kv         the same: a chunk reads its keys once
        decode_tokens    bytes of a sequence's recurrent states, read and written / M
        prefill_tokens, finetune_tokens   their products / (attention x FLOP/s)
        attention_pairs  4 H heads layers / (attention x FLOP/s), a half for causality
        layer_units      unit_s + (1 + recompute) x 2 U P_layer / C + unit_passes x U ffn bytes / M
                         + products of recurrent states / (attention x FLOP/s)
                         + all-reduces of a layer
        loss_units       unit_s + 4 U V D / C: logits, and their gradient's sum over the head
        backward_pairs   five products where the forward has two
        adapter_slots    2 x 2 R (d_in + d_out) of all projections / C
                         + layers x adapter_passes x ffn bytes / M
        dropout_slots    what all projections read, written and read again, with a mask each / M
        dropout_units    of U tokens in a layer, twice that
        ..._rows         V float32 of a row, read or written so many times (`_PASSES`), by each
                         device for itself; of log-probabilities the logits, too: 2 V D / C
    """
    e = efficiency or Efficiency()
    compute = e.compute * device.flops_per_s * tp
    memory = e.memory * device.bytes_per_s * tp
    parameters = model.layers * model.layer_parameters
    row_bytes = model.d_model * model.dtype_bytes

    def all_reduce_s(tokens: int) -> float:
        """A layer's two all-reduces, by rings."""
        if tp == 1:
            return 0.0
        moved = 2 * (tp - 1) / tp * tokens * row_bytes
        return 2 * (e.all_reduce_s + moved / device.link_bytes_per_s)

    def base_s(tokens: int) -> float:
        compute_s = 2 * tokens * parameters / compute
        read_s = model.streamed_bytes / memory
        p = e.sharpness
        both = (compute_s**p + read_s**p) ** (1 / p)
        return e.step_s + both + model.layers * all_reduce_s(tokens)

    mean = 1 / model.layers
    ffn = mean * model.total(lambda layer: layer.ffn)
    queries = mean * model.total(lambda layer: layer.queries)
    widths = mean * model.total(lambda layer: sum(map(sum, model.projections(layer))))
    inputs = mean * model.total(lambda layer: sum(d_in for d_in, _ in model.projections(layer)))
    dropout_s = 2 * inputs * model.dtype_bytes / memory
    attended = compute * (1.0 if e.attention is None else e.attention / e.compute)
    pair_s = 0.5 * 4 * queries / attended
    pass_s = ffn * model.dtype_bytes / memory  # of a token
    unit = (1 + e.recompute) * 2 * unit_tokens * model.layer_parameters / compute
    unit += e.unit_passes * unit_tokens * pass_s
    states = mean * model.total(lambda layer: layer.state_backward_flops)
    unit += unit_tokens * states / attended
    state_s = model.total(lambda layer: layer.state_flops) / attended
    row_pass_s = 4 * model.vocab / (e.memory * device.bytes_per_s)
    sampled = {name: passes * row_pass_s for name, passes in _PASSES.items()}
    sampled["logprob_rows"] += 2 * model.head_parameters / compute
    return LatencyModel(
        {bucket: base_s(bucket) for bucket in buckets},
        {
            "decode_tokens": 2 * model.total(lambda layer: layer.state_bytes) / memory,
            "prefill_tokens": state_s,
            "finetune_tokens": state_s,
            "decode_kv": model.kv_bytes / memory,
            "chunk_kv": model.kv_bytes / memory,
            "attention_pairs": model.layers * pair_s,
            "layer_units": e.unit_s + unit + all_reduce_s(unit_tokens),
            "loss_units": e.unit_s + 4 * unit_tokens * model.head_parameters / compute,
            "backward_pairs": 2.5 * pair_s,
            "adapter_slots": model.layers
            * (2 * rank * widths / compute + e.adapter_passes * pass_s),
            "dropout_slots": model.layers * dropout_s,
            "dropout_units": 2 * unit_tokens * dropout_s,
            **sampled,
        },
        spread=spread,
    )

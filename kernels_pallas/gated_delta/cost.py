"""The least work of the gated delta rule: what rooflines are made of."""

from dataclasses import dataclass, replace

from kernels_pallas.gated_delta.base import CHUNK


@dataclass(frozen=True)
class DeltaShape:
    """What the kernels see of a layer, or of its shard on one of several devices. item: bytes of a
    query's, key's or value's number."""

    name: str
    key_heads: int
    value_heads: int
    dk: int = 128
    dv: int = 128
    item: int = 2

    def shard(self, devices: int) -> "DeltaShape":
        """The shape that one of `devices` sees under tensor parallelism."""
        heads = {"key_heads": self.key_heads, "value_heads": self.value_heads}
        name = f"{self.name}/tp{devices}"
        return replace(self, name=name, **{key: n // devices for key, n in heads.items()})

    @property
    def state_bytes(self) -> int:
        """Of one sequence, in float32."""
        return 4 * self.value_heads * self.dk * self.dv

    @property
    def row_bytes(self) -> int:
        """Of a token's query, key, value and output, log decay and beta."""
        numbers = 2 * self.key_heads * self.dk + 2 * self.value_heads * self.dv
        return numbers * self.item + 8 * self.value_heads


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes that must be read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def decode_cost(shape: DeltaShape, rows: int) -> Cost:
    """Of rows of one token: their states are read and written, and used in three products."""
    products = 6 * shape.value_heads * shape.dk * shape.dv
    return Cost(rows * products, rows * (2 * shape.state_bytes + shape.row_bytes))


def chunk_cost(shape: DeltaShape, tokens: int, sequences: int = 1, windows: int = 0) -> Cost:
    """Of sequences with so many tokens in all, and of the states before windows.

    A token's products are three with the state, and four with the half of its chunk that is before
    it: two of keys' and two of values' width.
    """
    products = 6 * shape.dk * shape.dv + 2 * CHUNK * (shape.dk + shape.dv)
    states = 2 * sequences + windows
    return Cost(
        tokens * shape.value_heads * products,
        tokens * shape.row_bytes + states * shape.state_bytes,
    )


def window_backward_cost(shape: DeltaShape, tokens: int) -> Cost:
    """Of the backward of a window: the states before its chunks again (two products with the
    state), and ten for their gradients; of half a chunk five of values' width and eight of
    keys'. Read and written are a state and its gradient, the rows, and the gradients of them."""
    products = 24 * shape.dk * shape.dv + CHUNK * (8 * shape.dk + 5 * shape.dv)
    return Cost(
        tokens * shape.value_heads * products, 2 * tokens * shape.row_bytes + 3 * shape.state_bytes
    )

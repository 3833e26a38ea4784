"""ModelGraph: a decoder model as data: tensors, operators, weights.

Families (models/families) build it; csrc/bindings reads it once at load into csrc/graph, which has
the same names and checks it; checkpoints take the list of weights from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

ElementType = Literal["float", "activation", "product", "token"]
Extent = Literal["prompt", "tile", "sequence"]
WeightKind = Literal["matrix", "table", "vector"]
PartOrder = Literal["stacked", "paired"]
OperatorKind = Literal[
    "embed",
    "rotary",
    "norm",
    "linear",
    "route",
    "experts",
    "rope",
    "attention",
    "residual",
    "round",
]
Epilogue = Literal["store", "add", "gate"]
PRODUCTS = ("linear", "experts")  # kinds that multiply by a matrix
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One of a run's activations.

    Attributes:
        columns: elements of a row.
        type: ``float`` everywhere; ``activation``: what the device multiplies; ``product``: what a
            product leaves before it is rounded to an activation.
        extent: a row for each row of the ``prompt``, of the ``tile`` that goes through a layer
            together, or for each ``sequence``.
    """

    name: str
    columns: int
    type: ElementType = "float"
    extent: Extent = "tile"


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Rows [first_row, first_row + rows) of one tensor of the checkpoint, by its canonical name."""

    source: str
    rows: int
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as operators use it, made of one or more tensors of the checkpoint.

    Attributes:
        kind: ``matrix`` [rows, columns], multiplied; ``table``, looked up by row; ``vector``
            [rows].
        order: parts one below the other, or ``paired``: gate and up rows alternate as the device
            wants.
        offset: added to every value of a vector.
    """

    name: str
    kind: WeightKind
    columns: int
    parts: tuple[WeightPart, ...]
    order: PartOrder = "stacked"
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Angles of rotary positions: position * inverse_frequencies[i].

    Attributes:
        scale: multiplies cos and sin.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One step of the model; csrc/graph/operator.h says what each kind computes.

    Tensors and weights are named; an empty name: none.

    Attributes:
        layer: -1: outside the layers.
        table: index of a rotary table.
        route: the tensor of a row's chosen experts.
        experts: matrices that lie in the weight one below the other; 0: it is one.
        slots: experts that a row has.
        sums_to_one: the weights of a row's experts do.
    """

    kind: OperatorKind
    name: str
    output: str
    layer: int = -1
    input: str = ""
    rotary: str = ""
    route: str = ""
    table: int = -1
    weight: str = ""
    bias: str = ""
    q_norm: str = ""
    k_norm: str = ""
    epilogue: Epilogue = "store"
    activation: Activation = "silu"
    eps: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    experts: int = 0
    slots: int = 0
    sums_to_one: bool = False

    @property
    def share(self) -> float:
        """Part of the weight that one row is multiplied with."""
        return self.slots / self.experts if self.experts else 1.0


@dataclass(slots=True, kw_only=True)
class ModelGraph:
    """A whole model. Operators are in the order of execution: see csrc/graph/model_graph.h."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_tables: list[RotaryTable] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)

    def tensor(
        self, name: str, columns: int, type: ElementType = "float", extent: Extent = "tile"
    ) -> str:
        """Add a tensor; returns its name."""
        self.tensors.append(Tensor(name, columns, type, extent))
        return name

    def matrix(self, name: str, columns: int, *parts: WeightPart, paired: bool = False) -> str:
        """Add a matrix [rows of all parts, columns]; returns its name."""
        order: PartOrder = "paired" if paired else "stacked"
        self.weights.append(Weight(name, "matrix", columns, parts, order))
        return name

    def table(self, name: str, columns: int, *parts: WeightPart) -> str:
        """Add a table [rows of all parts, columns], looked up by row; returns its name."""
        self.weights.append(Weight(name, "table", columns, parts))
        return name

    def vector(
        self, name: str, *parts: WeightPart, paired: bool = False, offset: float = 0.0
    ) -> str:
        """Add a vector of all parts' values; returns its name."""
        order: PartOrder = "paired" if paired else "stacked"
        self.weights.append(Weight(name, "vector", 1, parts, order, offset))
        return name

    def add(self, kind: OperatorKind, name: str, **fields: object) -> None:
        """Add an operator; see Operator for the fields."""
        self.operators.append(Operator(kind=kind, name=name, **fields))  # type: ignore[arg-type]

    def sources(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the checkpoint by canonical name, with their shapes, in order."""
        rows: dict[str, int] = {}
        columns: dict[str, tuple[int, ...]] = {}
        for weight in self.weights:
            for part in weight.parts:
                rows[part.source] = max(rows.get(part.source, 0), part.first_row + part.rows)
                columns[part.source] = () if weight.kind == "vector" else (weight.columns,)
        return {source: (count, *columns[source]) for source, count in rows.items()}

    def products(self) -> Iterator[tuple[Operator, int]]:
        """Yield every product with the elements of its weight."""
        for operator, weight in self.product_weights():
            yield operator, weight.columns * sum(part.rows for part in weight.parts)

    def product_weights(self) -> Iterator[tuple[Operator, Weight]]:
        """Yield every product with its weight."""
        weights = {weight.name: weight for weight in self.weights}
        for operator in self.operators:
            if operator.kind in PRODUCTS:
                yield operator, weights[operator.weight]

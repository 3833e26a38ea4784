"""build_decoder: the graph of a decoder like Llama, whose variants are fields of ModelConfig.

Families use it as their builder; one that it cannot describe brings a builder of its own.
"""

from __future__ import annotations

from flowprefill.models.graph import ModelGraph, RotaryTable, WeightPart
from flowprefill.models.model_config import ModelConfig, rope_inverse_frequencies
from flowprefill.models.rope import RopeScaling, inverse_frequencies


def build_decoder(config: ModelConfig, layer_class: type[DecoderLayer] | None = None) -> ModelGraph:
    """Return the graph; weights have the canonical names of weight_names.py.

    Args:
        layer_class: adds the layers; None: DecoderLayer.
    """
    g = ModelGraph(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_tables=_rotary_tables(config),
    )
    _add_tensors(g, config)
    hidden, vocab = config.hidden_size, config.vocab_size
    embed = WeightPart("embed", vocab)
    g.table("embed", hidden, embed)
    g.add("embed", "embed", output="hidden", weight="embed", scale=config.embed_scale)
    for table in range(len(g.rotary_tables)):
        g.add("rotary", "rotary", output=_rotary(table), table=table)
    for layer in range(config.num_layers):
        (layer_class or DecoderLayer)(g, config, layer).add()
    norm = g.vector("final_norm", WeightPart("final_norm", hidden), offset=config.norm_offset)
    g.add("norm", "final_norm", input="hidden", output="last", eps=config.rms_eps, weight=norm)
    head = embed if config.tie_embeddings else WeightPart("lm_head", vocab)
    g.add(
        "linear", "lm_head", input="last", output="logits",
        weight=g.matrix("lm_head", hidden, head),
        scale=config.logit_scale, softcap=config.logit_softcap,
    )  # fmt: skip
    return g


def _rotary_tables(config: ModelConfig) -> list[RotaryTable]:
    """Return the table of all layers, and that of sliding layers if they have one of their own."""
    found = [rope_inverse_frequencies(config)]
    if config.local_rope_theta:
        local = config.rotary_dim, config.local_rope_theta, RopeScaling()
        found.append(inverse_frequencies(*local))
    return [RotaryTable(tuple(map(float, inverse)), float(scale)) for inverse, scale in found]


def _rotary(table: int) -> str:
    return "local_rotary" if table else "rotary"


def _add_tensors(g: ModelGraph, config: ModelConfig) -> None:
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    g.tensor("hidden", hidden, extent="prompt")
    for table in range(len(g.rotary_tables)):
        g.tensor(_rotary(table), config.rotary_dim, extent="prompt")
    g.tensor("normed", hidden, "activation")
    g.tensor("qkv", q + 2 * kv, "product")
    g.tensor("q", q, "activation")
    g.tensor("context", q, "activation")
    if not all(config.expert_layers):
        g.tensor("gated", config.intermediate_size, "activation")
    if any(config.expert_layers):
        slots = config.experts_per_token
        g.tensor("router", config.num_experts)
        g.tensor("route", 2 * slots)
        g.tensor("expert_gated", slots * config.expert_size, "activation")
    if _has_branch(config):
        g.tensor("branch", hidden)
    g.tensor("last", hidden, "activation", extent="sequence")
    g.tensor("logits", config.vocab_size, extent="sequence")


def _has_branch(config: ModelConfig) -> bool:
    """Whether something happens between a product and its addition to the residual stream."""
    return config.post_norms or config.residual_scale != 1.0


class DecoderLayer:
    """Adds one layer's operators and weights; a subclass may order them otherwise."""

    def __init__(self, g: ModelGraph, config: ModelConfig, layer: int) -> None:
        self.g, self.config, self.layer = g, config, layer

    def add(self) -> None:
        """Add attention, then the MLP, each with the norms around it."""
        post_norm = "post_norm" if self.config.post_norms else ""
        self.norm_before("attn_norm")
        self.attention()
        self.add_attention(post_norm and f"attn_{post_norm}")
        self.norm_before("mlp_norm")
        if self.config.expert_layers[self.layer]:
            self.route()
            self.add_experts()
            return
        self.gate_and_up()
        self.add_mlp(post_norm and f"mlp_{post_norm}")

    def norm_before(self, name: str) -> None:
        """Bring the residual stream into ``normed``, where the next products read it."""
        where = {"layer": self.layer, "input": "hidden", "output": "normed"}
        if not self.config.pre_norms:
            self.g.add("round", name.replace("norm", "round"), **where)
            return
        weight = self._norm_weight(name, self.config.hidden_size)
        self.g.add("norm", name, eps=self.config.rms_eps, weight=weight, **where)

    def attention(self) -> None:
        """From ``normed`` to ``context``: projections, rotation, attention."""
        config, layer = self.config, self.layer
        is_sliding = config.sliding_layers[layer]
        self.g.add(
            "linear", "qkv_proj", layer=layer, input="normed", output="qkv",
            weight=self._matrix("qkv", config.hidden_size, *self._qkv("")),
        )  # fmt: skip
        self.g.add(
            "rope", "rope", layer=layer, input="qkv", output="q",
            rotary=_rotary(1 if is_sliding and config.local_rope_theta else 0),
            eps=config.rms_eps, scale=config.attention_scale,
            bias=self._vector("qkv_bias", *self._qkv("_bias")) if config.qkv_bias else "",
            **self._qk_norms(),
        )  # fmt: skip
        self.g.add(
            "attention", "attention", layer=layer, input="q", output="context",
            window=config.sliding_window if is_sliding else 0, softcap=config.score_softcap,
        )  # fmt: skip

    def gate_and_up(self) -> None:
        """From ``normed`` to ``gated``: the MLP's first products and the gate."""
        config = self.config
        bias = (
            self._vector("gate_up_bias", *self._gate_up("_bias"), paired=True)
            if config.mlp_bias
            else ""
        )
        self.g.add(
            "linear", "gate_up_proj", layer=self.layer, input="normed", output="gated",
            epilogue="gate", activation=config.activation, bias=bias,
            weight=self._matrix("gate_up", config.hidden_size, *self._gate_up(""), paired=True),
        )  # fmt: skip

    def route(self) -> None:
        """From ``normed`` to ``route``: each row's experts and their weights."""
        config, layer = self.config, self.layer
        router = self._matrix(
            "router", config.hidden_size, self._part("router", config.num_experts)
        )
        self.g.add("linear", "router", layer=layer, input="normed", output="router", weight=router)
        self.g.add(
            "route", "route", layer=layer, input="router", output="route",
            slots=config.experts_per_token, sums_to_one=config.norm_experts,
        )  # fmt: skip

    def add_experts(self) -> None:
        """From ``normed`` to the residual stream: the MLPs of each row's experts."""
        config = self.config
        inner, hidden = config.expert_size, config.hidden_size
        mixture = {
            "layer": self.layer, "route": "route",
            "experts": config.num_experts, "slots": config.experts_per_token,
        }  # fmt: skip
        gate_up = [*self._experts("expert_gate", inner), *self._experts("expert_up", inner)]
        self.g.add(
            "experts", "expert_gate_up", input="normed", output="expert_gated", epilogue="gate",
            activation=config.activation,
            weight=self._matrix("expert_gate_up", hidden, *gate_up, paired=True), **mixture,
        )  # fmt: skip
        self.g.add(
            "experts", "expert_down", input="expert_gated", output="hidden", epilogue="add",
            weight=self._matrix("expert_down", inner, *self._experts("expert_down", hidden)),
            **mixture,
        )  # fmt: skip

    def _experts(self, name: str, rows: int) -> list[WeightPart]:
        return [self._part(f"{name}.{expert}", rows) for expert in range(self.config.num_experts)]

    def add_attention(self, post_norm: str) -> None:
        """From ``context`` to the residual stream, through a norm if one is named."""
        columns = self.config.num_heads * self.config.head_dim
        self._add_product("o", columns, "context", post_norm, self.config.o_bias)

    def add_mlp(self, post_norm: str) -> None:
        """From ``gated`` to the residual stream, through a norm if one is named."""
        columns = self.config.intermediate_size
        self._add_product("down", columns, "gated", post_norm, self.config.mlp_bias)

    def _part(self, name: str, rows: int, first_row: int = 0) -> WeightPart:
        return WeightPart(f"layers.{self.layer}.{name}", rows, first_row)

    def _matrix(self, name: str, columns: int, *parts: WeightPart, paired: bool = False) -> str:
        return self.g.matrix(f"layers.{self.layer}.{name}", columns, *parts, paired=paired)

    def _vector(
        self, name: str, *parts: WeightPart, paired: bool = False, offset: float = 0.0
    ) -> str:
        return self.g.vector(f"layers.{self.layer}.{name}", *parts, paired=paired, offset=offset)

    def _norm_weight(self, name: str, columns: int) -> str:
        return self._vector(name, self._part(name, columns), offset=self.config.norm_offset)

    def _qkv(self, suffix: str) -> list[WeightPart]:
        """Return the parts of the weight, or with ``_bias`` of the bias, of q, k and v."""
        config = self.config
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if config.fused_qkv:
            return [self._part("qkv" + suffix, q + 2 * kv)]
        rows = {"q": q, "k": kv, "v": kv}
        return [self._part(name + suffix, count) for name, count in rows.items()]

    def _gate_up(self, suffix: str) -> list[WeightPart]:
        inner = self.config.intermediate_size
        if self.config.fused_gate_up:
            return [self._part("gate_up" + suffix, inner, first) for first in (0, inner)]
        return [self._part(name + suffix, inner) for name in ("gate", "up")]

    def _qk_norms(self) -> dict[str, str]:
        config = self.config
        if not config.qk_norm:
            return {}
        heads = {"q_norm": config.num_heads, "k_norm": config.num_kv_heads}
        return {
            name: self._norm_weight(
                name, config.head_dim * (count if config.qk_norm_over_heads else 1)
            )
            for name, count in heads.items()
        }

    def _add_product(
        self, name: str, columns: int, input: str, post_norm: str, has_bias: bool
    ) -> None:
        """Add a product to the residual stream, by way of the norm and the scale behind it."""
        config, hidden = self.config, self.config.hidden_size
        weight = self._matrix(name, columns, self._part(name, hidden))
        bias = self._vector(f"{name}_bias", self._part(f"{name}_bias", hidden)) if has_bias else ""
        product = {"layer": self.layer, "input": input, "weight": weight, "bias": bias}
        if not post_norm and config.residual_scale == 1.0:
            self.g.add("linear", f"{name}_proj", output="hidden", epilogue="add", **product)
            return
        self.g.add("linear", f"{name}_proj", output="branch", **product)
        self.g.add(
            "residual", f"{name}_residual", layer=self.layer, input="branch", output="hidden",
            eps=config.rms_eps, scale=config.residual_scale,
            weight=self._norm_weight(post_norm, hidden) if post_norm else "",
        )  # fmt: skip

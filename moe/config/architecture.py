"""The fields of a model and what they must satisfy, named as in Hugging Face's DeepseekV3Config where it has one."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from moe.config.fields import Section, setting
from moe.config.routing import routing_fault

__all__ = ["Architecture"]


@dataclass(frozen=True, kw_only=True)
class Architecture(Section):
    """Fields and checks; `moe.ModelConfig` is this with the models derived from it."""

    section_name: ClassVar[str] = "model"

    vocab_size: int = setting(doc="tokens in the vocabulary", at_least=1)
    hidden_size: int = setting(doc="width of the residual stream", at_least=1)
    num_hidden_layers: int = setting(doc="decoder layers", at_least=1, at_most=10_000)
    num_attention_heads: int = setting(doc="query heads", at_least=1)
    intermediate_size: int = setting(doc="width of a dense layer's SwiGLU", at_least=1)

    attention: Literal["mla", "gqa"] = setting(
        "mla", doc="mla: keys and values from one latent per token; gqa: grouped-query attention"
    )
    q_lora_rank: int | None = setting(None, at_least=1, doc="mla: rank of the query projection; none for a full matrix")
    kv_lora_rank: int = setting(0, at_least=0, doc="mla: width of the latent keys and values come from")
    qk_nope_head_dim: int = setting(0, at_least=0, doc="mla: per head, query and key part without position")
    qk_rope_head_dim: int = setting(0, at_least=0, doc="mla: per head, query and key part with position")
    v_head_dim: int = setting(0, at_least=0, doc="mla: per head, value width")
    latent_norm_eps: float = setting(1e-6, above=0, doc="mla: epsilon of the norms of the latents")
    num_key_value_heads: int | None = setting(None, at_least=1, doc="gqa: key and value heads; none for one a head")
    head_dim: int | None = setting(None, at_least=2, doc="gqa: width of a head; none for hidden_size / heads")
    qk_norm: Literal["none", "head", "full"] = setting(
        "none", doc="gqa: RMSNorm of queries and keys, per head or over all heads together"
    )
    clip_qkv: float | None = setting(
        None, above=0, doc="gqa: largest magnitude of entries of queries, keys and values; none for any"
    )
    attention_bias: bool = setting(False, doc="biases in the attention projections")
    attention_output_bias: bool | None = setting(
        None, doc="gqa: bias in the output projection; none for as attention_bias"
    )
    rope_theta: float = setting(10000.0, above=1, doc="base of the rotary frequencies")
    rope_type: Literal["default", "linear", "llama3", "yarn"] = setting(
        "default", doc="how positions are stretched over a longer context; default: not at all"
    )
    rope_factor: float = setting(1.0, at_least=1, doc="how far positions are stretched; 1 for not at all")
    rope_original_max_position_embeddings: int = setting(
        4096, at_least=1, doc="llama3, YaRN: context before stretching, in tokens"
    )
    rope_low_freq_factor: float = setting(
        1.0, above=0, doc="llama3: pairs that turn less often than this in the context before are slowed down fully"
    )
    rope_high_freq_factor: float = setting(
        4.0, above=0, doc="llama3: pairs that turn more often than this in the context before keep their frequency"
    )
    rope_beta_fast: float = setting(
        32.0, above=0, doc="YaRN: pairs that turn more often than this keep their frequency"
    )
    rope_beta_slow: float = setting(
        1.0, above=0, doc="YaRN: pairs that turn less often than this are slowed down fully"
    )
    rope_mscale: float = setting(0.0, at_least=0, doc="YaRN: sharpening of the rotary tables; 0 for the usual")
    rope_mscale_all_dim: float = setting(
        0.0, at_least=0, doc="YaRN: sharpening of latent attention's softmax; 0 for none"
    )

    n_routed_experts: int = setting(0, at_least=0, doc="routed experts a layer; 0 for a dense model")
    n_shared_experts: int = setting(0, at_least=0, doc="experts every token passes, as one SwiGLU of that many widths")
    num_experts_per_tok: int = setting(0, at_least=0, doc="routed experts a token is sent to (top_k)")
    n_null_experts: int = setting(
        0,
        at_least=0,
        doc="further choices of the router that compute nothing: a token may use fewer than top_k",
    )
    moe_intermediate_size: int = setting(0, at_least=0, doc="width of one expert's SwiGLU")
    first_k_dense_replace: int = setting(0, at_least=0, doc="this many first layers are dense")
    score_func: Literal["sigmoid", "softmax"] = setting("sigmoid", doc="how router logits become scores")
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = setting(
        "noaux_tc",
        doc="greedy: over all experts; group_limited_greedy: over the groups with the largest score; "
        "noaux_tc: over the groups with the largest sum of two biased scores",
    )
    n_group: int = setting(1, at_least=1, doc="groups the experts are divided into")
    topk_group: int = setting(1, at_least=1, doc="groups a token may choose from")
    norm_topk_prob: bool = setting(True, doc="weights of the chosen experts sum to 1 before scaling")
    routed_scaling_factor: float = setting(1.0, above=0, doc="factor on the weights of the chosen experts")

    max_position_embeddings: int = setting(4096, at_least=1, doc="longest sequence")
    rms_norm_eps: float = setting(1e-6, above=0, doc="epsilon of every RMSNorm but those of the latents")
    tie_word_embeddings: bool = setting(False, doc="the output head shares the embedding's matrix")
    num_nextn_predict_layers: int = setting(
        0,
        at_least=0,
        at_most=100,
        doc="multi-token prediction modules, each one further token ahead; for training only",
    )
    initializer_range: float = setting(
        0.02, above=0, doc="standard deviation of the initial weights; DeepSeek-V3 uses 0.006"
    )
    initialization: Literal["normal", "scaled"] = setting(
        "normal",
        doc="normal: initializer_range everywhere (DeepSeek-V3); scaled: matrices that write to the residual stream "
        "start smaller, by the square root of twice the layers (GPT-2)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rope()
        if self.attention == "mla":
            self._check_mla()
        else:
            self._check_gqa()
        if self.n_routed_experts:
            self._check_experts()

    def _check_rope(self) -> None:
        if self.rope_type == "default" and self.rope_factor != 1:
            self.fail("rope_factor", "says how far, but not how: set model.rope_type to linear, llama3 or yarn")
        if self.rope_type != "default" and self.rope_factor == 1:
            self.fail("rope_type", "needs model.rope_factor above 1: how far positions are stretched")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            self.fail("rope_low_freq_factor", f"must be below rope_high_freq_factor ({self.rope_high_freq_factor:g})")
        if self.rope_beta_fast < self.rope_beta_slow:
            self.fail("rope_beta_fast", f"must not be below rope_beta_slow ({self.rope_beta_slow:g})")

    def _check_mla(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) == 0:
                self.fail(name, "is needed by attention='mla': give it, or set model.attention=gqa")
        if self.qk_rope_head_dim % 2:
            self.fail("qk_rope_head_dim", "must be even: rotary positions turn pairs")
        if self.qk_norm != "none":
            self.fail("qk_norm", "is for attention='gqa'; mla normalises its latents instead")
        if self.attention_output_bias is not None:
            self.fail("attention_output_bias", "is for attention='gqa'; in mla attention_bias says it")
        if self.clip_qkv is not None:
            self.fail("clip_qkv", "is for attention='gqa': leave it none")

    def _check_gqa(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            self.fail("num_key_value_heads", f"must divide num_attention_heads ({heads})")
        if self.head_dim is None and self.hidden_size % heads:
            self.fail("hidden_size", f"must be divisible by num_attention_heads ({heads}), or give head_dim")
        if (self.head_dim or self.hidden_size // heads) % 2:
            self.fail("head_dim", "must be even: rotary positions turn pairs")

    def _check_experts(self) -> None:
        if self.moe_intermediate_size < 1:
            self.fail("moe_intermediate_size", "must be at least 1 when there are routed experts")
        if self.first_k_dense_replace >= self.num_hidden_layers:
            self.fail(
                "first_k_dense_replace",
                f"leaves no layer for the experts: make it less than num_hidden_layers ({self.num_hidden_layers})",
            )
        fault = routing_fault(
            n_routed_experts=self.n_routed_experts,
            n_null_experts=self.n_null_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            topk_method=self.topk_method,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        if fault:
            self.fail(*fault)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.n_routed_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has routed experts."""
        return self.is_moe and layer >= self.first_k_dense_replace

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers carry a selection bias for balancing: the architecture decides, as in Hugging Face."""
        return self.is_moe and self.topk_method == "noaux_tc"

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim if self.attention == "mla" else self.qk_head_dim

    @property
    def rotary_dim(self) -> int:
        """Part of a head that rotary positions turn."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.qk_head_dim

    @property
    def mean_experts_per_tok(self) -> float:
        """Routed experts a token passes in the mean when load is even: fewer than top_k where some choices are null."""
        if not self.is_moe:
            return 0.0
        return self.num_experts_per_tok * self.n_routed_experts / (self.n_routed_experts + self.n_null_experts)

    @property
    def active_width(self) -> int:
        """SwiGLU width one token passes in an MoE layer in the mean: chosen and shared experts together."""
        return round((self.mean_experts_per_tok + self.n_shared_experts) * self.moe_intermediate_size)

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

"""What a routing must satisfy, for configurations and for layers that are made without one."""

__all__ = ["TOPK_METHODS", "routing_fault"]

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def routing_fault(
    *,
    n_routed_experts: int,
    n_null_experts: int,
    num_experts_per_tok: int,
    topk_method: str,
    n_group: int,
    topk_group: int,
) -> tuple[str, str] | None:
    """The first field that cannot be, and what is wrong with it; None when all fit together."""
    experts, top_k = n_routed_experts, num_experts_per_tok
    if topk_method not in TOPK_METHODS:
        return "topk_method", f"must be one of {', '.join(TOPK_METHODS)}"
    if not 1 <= top_k <= experts:
        return "num_experts_per_tok", f"must be between 1 and n_routed_experts ({experts})"
    if n_null_experts < 0:
        return "n_null_experts", "must be at least 0"
    if n_null_experts and n_group > 1:
        return "n_null_experts", f"are in no group: leave n_group at 1, not {n_group}"
    if n_group < 1 or experts % n_group:
        return "n_group", f"must divide n_routed_experts ({experts})"
    if not 1 <= topk_group <= n_group:
        return "topk_group", f"must be between 1 and n_group ({n_group})"
    if topk_method == "greedy" and n_group > 1:
        return "n_group", "needs topk_method group_limited_greedy or noaux_tc; greedy knows no groups"
    per_group = experts // n_group
    if top_k > topk_group * per_group:
        return "num_experts_per_tok", f"exceeds the {topk_group * per_group} experts of topk_group groups"
    if topk_method == "noaux_tc" and n_group > 1 and per_group < 2:
        return "n_group", "leaves one expert a group; noaux_tc sums the two best of each group"
    return None

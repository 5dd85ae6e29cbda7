"""ElasticMoELayer: drop-in for the `experts` module of a Mixture-of-Experts block."""

import torch
from torch import nn

from elastic_moe.experts.slots import SlotExperts
from elastic_moe.placement.placement import EMPTY
from elastic_moe.runtime.pool import ExpertPool


class ElasticMoELayer(nn.Module):
    """Choose slots -> dispatch -> experts -> combine, for one MoE layer of one rank.

    Routing stays the model's own. A token's K results are summed in float32 in the order of K, so where an expert
    lives does not change the result. Every rank of the group calls the layers in the same order; a rank without
    tokens calls with T = 0 and does its experts' share for the others.
    """

    def __init__(self, layer: int, experts: SlotExperts, pool: ExpertPool) -> None:
        """`layer` is the number of this MoE layer in the placement (dense layers are not counted)."""
        super().__init__()
        self.layer = layer
        self.experts = experts
        self.num_experts = experts.layout.num_experts
        self._pool = pool

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply each token's experts.

        Args:
            hidden_states: [T, D].
            top_k_index: int64 [T, K], logical experts picked by the router. "None" is -1 or, as transformers says it,
                E; so is whatever else is no expert. It adds nothing and does not travel.
            top_k_weights: [T, K], their weights: finite, also of "none", whose result is zeros.

        Returns:
            [T, D] in the dtype of `hidden_states`.

        Raises:
            PeerLost: a peer of the group died, left, or missed the deadline.
            ValueError: gradients are wanted while an expert has replicas.
        """
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.experts.parameters())
        if trains and self._pool.placement.has_replicas:
            raise ValueError("training needs a placement without replicas: replica gradients are not summed yet")
        is_expert = top_k_index == top_k_index.clamp(0, self.num_experts - 1)
        experts = torch.where(is_expert, top_k_index, EMPTY)  # from here on -1 is the only "none"
        self._pool.loads.count(self.layer, experts)
        self._pool.pulse.beat()
        exchange = self._pool.exchange
        slots = self._pool.registry.choose_slots(self.layer, experts)
        fused = self.experts.fused(hidden_states) if self._pool.placement.num_ranks == 1 else None
        if fused is not None:  # all slots are this rank's own: nothing to exchange
            return fused.compute_routed(hidden_states, slots, top_k_weights)
        sent = exchange.dispatch(hidden_states, slots)
        results = exchange.combine(self.experts(sent.rows, sent.offsets, sent.expected_rows), sent.ticket)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weighted = results.to(dtype) * top_k_weights.to(dtype).unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def join_idle(self) -> None:
        """Take part in this layer's exchange with no tokens.

        Raises:
            PeerLost: a peer of the group died, left, or missed the deadline.
        """
        weight = next(self.experts.parameters())
        nothing = weight.new_empty((0, self.experts.hidden_size))
        self(nothing, torch.empty((0, 1), dtype=torch.int64, device=weight.device), nothing[:, :1])

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"layer={self.layer}, num_experts={self.num_experts}, num_slots={self.experts.num_slots}"

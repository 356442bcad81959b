"""Dynamic Token Routing (SPAR, arXiv 2606.23041): every token mixes the states that it has after several layers of the
language model with weights of its own.

What the router reads, the text does not say. Here it is the state itself: layer l gives token t the logit

    a_tl = (w_l · n(h_tl) + b_l) / τ        n: RMS norm without weights; static: b_l alone
    y_t  = Σ_l p_tl n(h_tl)                 p_t: softmax over the mixed layers, or over the k of the largest logits

so that nothing must be known of a token before its layers have run, and layers may be on any pipeline stage. The sum
runs along with the layers, as flash attention's does over keys (arXiv 1805.02867): of a token travel its logits, and

    Σ_l exp(a_tl − m_t) n(h_tl)             m_t = max_l a_tl of the layers so far;   or, with top_k, its k states

    [hidden states | deepstack levels | k states or the sum | logits]      (1 + K' + k) t + ⌈t L / H⌉ rows

between stages (k = 1 for the softmax over all), exactly, whatever the number of layers. The maximum, and which k are
the largest, are read off the logits. Deepstack: ``models/backbone/deepstack.py``.

Legend  t tokens of this rank, L mixed layers, H hidden size, k kept states.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_unimm.config.routing import RoutingConfig

EPSILON = 1e-6
ROUTER_MARK = "layer_router."
"""In the names of a router's parameters."""


class Mixture(NamedTuple):
    """What the last stage has of each token."""

    mixed: Tensor
    """``[t, H]``."""
    logits: Tensor
    """``[t, L]``."""


class LayerMixture:
    """How a chunk's rows hold the mixture, and how a layer adds its states to it.

    Args:
        layers: zero-based, those that are mixed.
        top_k: states that a token keeps; None sums all.
        first: the chunk that begins; none is in what it receives.
    """

    def __init__(self, layers: list[int], hidden_size: int, top_k: int | None = None, first: bool = True) -> None:
        self.layers = layers
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.num_kept = top_k or 1
        self.first = first
        self._taken: Tensor | None = None

    @classmethod
    def of(cls, routing: RoutingConfig, num_layers: int, hidden_size: int, first: bool) -> "LayerMixture":
        return cls(routing.mixed(num_layers), hidden_size, routing.top_k, first)

    def num_rows(self, num_tokens: int) -> int:
        """Rows of t tokens that travel beside their hidden states."""
        return self.num_kept * num_tokens + math.ceil(num_tokens * len(self.layers) / self.hidden_size)

    def split(self, rows_r1H: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Blocks of hidden states and levels ``[num_blocks t, 1, H]``, and what is mixed so far ``[n, 1, H]``."""
        if self.first:
            num_tokens = len(rows_r1H) // num_blocks
            return rows_r1H, rows_r1H.new_zeros(self.num_rows(num_tokens), *rows_r1H.shape[1:])
        # r = (blocks + k) t + ⌈t L / H⌉ grows by more than one with each token: it tells t.
        per_token = (num_blocks + self.num_kept) * self.hidden_size + len(self.layers)
        num_tokens = len(rows_r1H) * self.hidden_size // per_token
        return rows_r1H[: num_blocks * num_tokens], rows_r1H[num_blocks * num_tokens :]

    def unpack(self, state_n1H: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Kept states ``[k, t, H]`` and logits ``[t, L]``."""
        kept, logits = state_n1H[:, 0].split([self.num_kept * num_tokens, len(state_n1H) - self.num_kept * num_tokens])
        count = len(self.layers)
        return kept.unflatten(0, (self.num_kept, num_tokens)), logits.flatten()[: num_tokens * count].view(-1, count)

    def pack(self, kept_ktH: Tensor, logits_tL: Tensor) -> Tensor:
        """The way back, ``[n, 1, H]``."""
        values = logits_tL.flatten()
        padded = F.pad(values, (0, -len(values) % self.hidden_size)).view(-1, self.hidden_size)
        return torch.cat([kept_ktH.flatten(0, 1), padded])[:, None]

    def add(self, state_n1H: Tensor, values_tH: Tensor, logit_t: Tensor, place: int) -> Tensor:
        """With the states of mixed layer ``place``; those before it are in already."""
        kept, logits = self.unpack(state_n1H, len(values_tH))
        after = torch.cat([logits[:, :place], logit_t[:, None], logits[:, place + 1 :]], dim=1)
        if self.top_k is not None:
            return self.pack(self._among_largest(kept, values_tH, after, place), after)
        known = after[:, : place + 1].detach().float()
        largest = known.amax(1)  # the result does not depend on it: nothing is learned through it
        added = (logit_t.float() - largest).exp()[:, None] * values_tH.float()
        if place:
            added = added + (known[:, :place].amax(1) - largest).exp()[:, None] * kept[0].float()
        return self.pack(added.to(kept.dtype)[None], after)

    def _among_largest(self, kept_ktH: Tensor, values_tH: Tensor, logits_tL: Tensor, place: int) -> Tensor:
        """The states of the k largest logits of layers up to ``place``, largest first."""
        before = _largest(logits_tL[:, :place], self.num_kept)  # [t, up to k]
        now = _largest(logits_tL[:, : place + 1], self.num_kept)
        # Where each of the layers that remain was kept; the new one comes behind them.
        where = (before[:, None] == now[:, :, None]).long()  # [t, now, before]
        old = (where * torch.arange(before.shape[1], device=now.device)).sum(2)
        index = torch.where(now == place, before.shape[1], old)  # [t, now]
        candidates = torch.cat([kept_ktH[: before.shape[1]], values_tH[None].to(kept_ktH.dtype)])
        chosen = candidates.gather(0, index.T[:, :, None].expand(-1, -1, candidates.shape[2]))
        return torch.cat([chosen, kept_ktH[len(chosen) :]])

    def result(self, state_n1H: Tensor, num_tokens: int) -> Mixture:
        """Once all layers are in."""
        kept, logits = self.unpack(state_n1H, num_tokens)
        wide = logits.float()
        if self.top_k is None:
            total = (wide - wide.detach().amax(1, keepdim=True)).exp().sum(1)
            return Mixture((kept[0].float() / total[:, None]).to(kept.dtype), logits)
        weights = wide.gather(1, _largest(logits, self.num_kept)).softmax(1)  # [t, k]
        return Mixture((weights.T[:, :, None] * kept.float()).sum(0).to(kept.dtype), logits)

    # -- behind the last layer of a chunk

    def take_off(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook before the final norm, which reads hidden states alone."""
        rows = args[0]
        blocks, self._taken = LayerMixture(self.layers, self.hidden_size, self.top_k, first=False).split(rows, 1)
        return (blocks, *args[1:])

    def taken(self) -> Tensor:
        """What the hook took off in this forward pass."""
        state, self._taken = self._taken, None
        assert state is not None
        return state


def _largest(logits_tL: Tensor, count: int) -> Tensor:
    """int64 ``[t, count]`` (as many as there are): layers by logit, largest first; of equal ones the lower."""
    return logits_tL.detach().float().argsort(dim=1, descending=True, stable=True)[:, :count]


class LayerRouter(nn.Module):
    """A layer's own logit of a token, and its state as it is mixed."""

    def __init__(self, routing: RoutingConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.temperature = routing.temperature
        self.bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.weight = None
        if routing.mode == "dynamic":
            self.weight = nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Sums its gradient over ranks that have different tokens.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_tH: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[t, H]`` and logits ``[t]``, both in the dtype that travels, so that every layout has the same."""
        states = F.rms_norm(hidden_tH.float(), hidden_tH.shape[1:], eps=EPSILON)
        logits = self.bias.float().expand(len(states))
        if self.weight is not None:
            logits = logits + states @ self.weight.float()
        return states.to(hidden_tH.dtype), (logits / self.temperature).to(hidden_tH.dtype)


class RoutedLayer(TransformerLayer):
    """A layer among those that are mixed, or between them.

    What is carried comes as ``context``, the argument that Megatron-Core's block hands from layer to layer (for
    cross-attention, which there is none of), also under recompute: deepstack levels, then the mixture. The block hands
    out hidden states alone, so the chunk's last layer puts the mixture under them.

    Args:
        place: among the mixed layers; None for one that is not.
        level: of deepstack that is added to its output; None for none.
        num_levels: that are carried.
        hands_on: the last on its chunk.
    """

    def __init__(
        self,
        *args: Any,
        mixture: LayerMixture,
        routing: RoutingConfig,
        place: int | None,
        level: int | None,
        num_levels: int,
        hands_on: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mixture, self.place = mixture, place
        self.level, self.num_levels, self.hands_on = level, num_levels, hands_on
        if place is not None:
            self.layer_router = LayerRouter(routing, self.config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``[t, 1, H]`` (or with the mixture under them) and what is carried."""
        hidden, carried = super().forward(*args, **kwargs)
        assert isinstance(hidden, Tensor)
        assert carried is not None, "the backbone gives its layers what they carry"
        levels, state = carried.split([self.num_levels * len(hidden), len(carried) - self.num_levels * len(hidden)])
        if self.level is not None:
            hidden = hidden + levels[self.level * len(hidden) : (self.level + 1) * len(hidden)]
        if self.place is not None:
            values, logits = self.layer_router(hidden[:, 0])
            state = self.mixture.add(state, values, logits, self.place)
        if self.hands_on:
            hidden = torch.cat([hidden, state])
        return hidden, torch.cat([levels, state])


def routing_weights(logits_nL: Tensor, top_k: int | None) -> Tensor:
    """p of each token, float32 ``[n, L]``: what routing maps show."""
    wide = logits_nL.float()
    if top_k is not None:
        chosen = torch.zeros_like(wide).scatter(1, _largest(logits_nL, top_k), 1.0)
        wide = wide.masked_fill(chosen == 0, float("-inf"))
    return wide.softmax(1)


def balance_loss(
    logits_nL: Tensor,
    sample_n: Tensor,
    num_samples: int,
    top_k: int | None,
    context_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Σ over samples of L Σ_l f_l P_l over the tokens of each, wherever they are: f the share of choices that fell on
    layer l (with the softmax over all: P itself), P the mean probability; 1 where all layers are used alike, L where
    one is (Switch, arXiv 2101.03961, eq. 4; within a sample, as DeepSeek-V3, arXiv 2412.19437, eq. 17, so that it does
    not depend on which samples share a row). This rank's part of it; the parts of all context ranks add up to it.

    Args:
        logits_nL: of this context rank's tokens, perhaps none.
        sample_n: int64: which sample each is of.
    """
    probabilities = logits_nL.float().softmax(1)
    chosen = probabilities if top_k is None else routing_weights(logits_nL, top_k).detach().sign() / top_k
    values = torch.cat([probabilities, chosen, torch.ones_like(probabilities)], dim=1)  # [n, 3 L]
    sums = values.new_zeros(num_samples, values.shape[1]).index_add(0, sample_n, values)
    if context_group.size() > 1:
        sums = reduce_from_tensor_model_parallel_region(sums, group=context_group)
        sums = copy_to_tensor_model_parallel_region(sums, group=context_group)
    mean, share, count = sums.chunk(3, dim=1)
    products = mean * share / count.clamp(min=1).square()
    return logits_nL.shape[1] * products.sum() / context_group.size()

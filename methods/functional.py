"""Modules and functions that several methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def prefix(embeddings: Float[Tensor, "rows dim"], dim: int) -> Float[Tensor, "rows prefix"]:
    """The first `dim` dimensions of each embedding, at length one."""
    return F.normalize(embeddings[:, :dim])


class PlusOneAttention(nn.Module):
    """Multi-head attention whose softmax has one more logit, a constant zero: weights sum to less than 1.

        α_ts = exp(q_t·k_s / √h) / (1 + Σ_s' exp(q_t·k_s' / √h)),    h = D / heads

    A node without any allowed source receives zero. The extra logit is a zero key with a zero value, so any kernel of
    PyTorch's attention serves. Linear layers start Xavier-uniform with zero bias.

    Args:
        dim: Dimension D of the nodes.
        heads: Number of heads, a divisor of D.
        dropout: Dropout rate of the weights α, after the softmax, in training mode.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, nodes: Float[Tensor, "nodes dim"], allowed: Bool[Tensor, "nodes nodes"] | None = None
    ) -> Float[Tensor, "nodes dim"]:
        """Messages to every node.

        Args:
            nodes: The nodes, which are both targets and sources.
            allowed: Mask [target, source], True where a message passes; None: everywhere.
        """
        query = self._split(self.query(nodes))
        key, value = (F.pad(self._split(projection(nodes)), (0, 0, 0, 1)) for projection in (self.key, self.value))
        mask = None if allowed is None else F.pad(allowed, (0, 1), value=True)
        dropout = self.dropout if self.training else 0.0
        messages = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out(messages[0].transpose(0, 1).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)[None]


_unused: list[np.random.MT19937] = []  # made once: it takes longer than a seeding


@contextlib.contextmanager
def global_generators(*seed: int) -> Iterator[None]:
    """Seeds torch's and numpy's global generators inside the block and restores them after it.

    For third-party losses and miners that draw from them: what they draw then depends on `seed` alone. 20 µs without a GPU,
    since the states are exchanged, not copied; of numpy's, a spare normal number of `np.random.normal` is not kept.
    """
    words = np.random.SeedSequence(seed).generate_state(2)
    outside = np.random.get_bit_generator()  # type: ignore[attr-defined]
    inside = _unused.pop() if _unused else np.random.MT19937()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    torch_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        np.random.set_bit_generator(inside)  # type: ignore[attr-defined]
        np.random.seed(int(words[1]))
        # `torch.manual_seed` seeds the devices too, and keeps a stack trace for a GPU that has not been used yet
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(words[0]))
        yield
    finally:
        torch.set_rng_state(torch_states[0])
        for device, state in zip(devices, torch_states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        np.random.set_bit_generator(outside)  # type: ignore[attr-defined]
        _unused.append(inside)

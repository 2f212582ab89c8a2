"""The losses on similarities that MMSI weights; pairs are [anchor, other], each similarity s has a weight w.

    contrastive        1/n Σ_i [Σ_P (1 - s) w + Σ_N s w]                                  N: s > margin
    multi_similarity   1/n Σ_i [2/β log(1 + Σ_P e^{-β(ws - λ)}) + 2/α log(1 + Σ_N e^{α(ws - λ)})]
    binomial           1/n Σ_i [mean_P 2/β log(1 + e^{-β(ws - λ)}) + mean_N 2/α log(1 + e^{α(ws - λ)})]
    lifted             1/n Σ_i [2/β log Σ_P e^{-βws} + 2/α log Σ_N e^{αws}]
    triplet            1/n Σ_(i,p,q) max(0, w (s_iq - s_ip) + margin)                     active triplets

Of multi_similarity, lifted (and binomial, if it is given a margin) the pairs are mined: a negative counts if it is nearer
than the farthest positive plus margin, a positive if it is farther than the nearest negative minus margin; an anchor
without either is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

MARGINS = {"contrastive": 0.8, "multi_similarity": 0.05, "binomial": None, "lifted": 0.1, "triplet": 0.1}


class Constants(NamedTuple):
    """The constants of the formulas.

    Attributes:
        margin: Margin of mining; None (binomial only): all pairs are used.
        alpha, beta, base: α, β, λ.
    """

    margin: float | None
    alpha: float
    beta: float
    base: float

    @property
    def required_margin(self) -> float:
        """The margin, for losses that always have one."""
        assert self.margin is not None
        return self.margin


class Selection(NamedTuple):
    """Masks of the pairs that a loss uses.

    Attributes:
        positives: Positive pairs, [anchor, other].
        negatives: Negative pairs, [anchor, other]; of a triplet loss [positive pair, in the order of the matrix; other].
        slots: Entries that have a weight; shape of `negatives`.
    """

    positives: Bool[Tensor, "anchors others"]
    negatives: Bool[Tensor, "rows others"]
    slots: Bool[Tensor, "rows others"]


class PairLoss(NamedTuple):
    """A loss on similarities.

    Attributes:
        select: (similarities, positive pairs, negative pairs, constants) to the selection after mining.
        value: (similarities, weights, selection, constants) to the sum over the anchors; weights 1.0 give the plain loss.
        meta: As `select`, for the meta batch against the memory.
    """

    select: Callable[[Tensor, Tensor, Tensor, Constants], Selection]
    value: Callable[[Tensor, Tensor | float, Selection, Constants], Tensor]
    meta: Callable[[Tensor, Tensor, Tensor, Constants], Selection]


def _all_pairs(positives: Tensor, negatives: Tensor) -> Selection:
    return Selection(positives, negatives, positives | negatives)


def _anchors_with_both(positives: Tensor, negatives: Tensor) -> Selection:
    """All pairs of the anchors that have both a positive and a negative."""
    has_both = positives.any(1, keepdim=True) & negatives.any(1, keepdim=True)
    return _all_pairs(positives & has_both, negatives & has_both)


def _mine(similarity: Tensor, positives: Tensor, negatives: Tensor, c: Constants) -> Selection:
    """Multi-similarity mining (Wang et al., CVPR 2019)."""
    if c.margin is None:
        return _all_pairs(positives, negatives)
    farthest = similarity.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
    nearest = similarity.masked_fill(~negatives, -torch.inf).amax(1, keepdim=True)
    return _anchors_with_both(
        positives & (nearest - similarity + c.margin > 0), negatives & (similarity + c.margin - farthest > 0)
    )


def _above(similarity: Tensor, positives: Tensor, negatives: Tensor, c: Constants) -> Selection:
    return _all_pairs(positives, negatives & (similarity > c.required_margin))


def _active(similarity: Tensor, positives: Tensor, negatives: Tensor, c: Constants) -> Selection:
    anchor, positive = positives.nonzero(as_tuple=True)
    gap = similarity[anchor] - similarity[anchor, positive][:, None]
    active = negatives[anchor] & (gap + c.required_margin > 0)
    return Selection(positives, active, active)


def _contrastive(s: Tensor, w: Tensor | float, selection: Selection, c: Constants) -> Tensor:
    return torch.where(selection.positives, (1 - s) * w, 0).sum() + torch.where(selection.negatives, s * w, 0).sum()


def _multi_similarity(s: Tensor, w: Tensor | float, selection: Selection, c: Constants) -> Tensor:
    positive_terms = _log_sum(-c.beta * (w * s - c.base), selection.positives, plus_one=True)
    return (
        2 / c.beta * positive_terms.sum()
        + 2 / c.alpha * _log_sum(c.alpha * (w * s - c.base), selection.negatives, plus_one=True).sum()
    )


def _binomial(s: Tensor, w: Tensor | float, selection: Selection, c: Constants) -> Tensor:
    positive_terms = _mean(F.softplus(-c.beta * (w * s - c.base)), selection.positives)
    return (
        2 / c.beta * positive_terms.sum()
        + 2 / c.alpha * _mean(F.softplus(c.alpha * (w * s - c.base)), selection.negatives).sum()
    )


def _lifted(s: Tensor, w: Tensor | float, selection: Selection, c: Constants) -> Tensor:
    positive_terms = _log_sum(-c.beta * w * s, selection.positives, plus_one=False)
    return (
        2 / c.beta * positive_terms.sum()
        + 2 / c.alpha * _log_sum(c.alpha * w * s, selection.negatives, plus_one=False).sum()
    )


def _triplet(s: Tensor, w: Tensor | float, selection: Selection, c: Constants) -> Tensor:
    anchor, positive = selection.positives.nonzero(as_tuple=True)
    gap = s[anchor] - s[anchor, positive][:, None]
    return torch.where(selection.negatives, F.relu(w * gap + c.required_margin), 0).sum()


def _log_sum(exponents: Tensor, mask: Tensor, plus_one: bool) -> Tensor:
    """log(Σ exp), or log(1 + Σ exp), over the masked entries of each row; 0 of a row that has none."""
    masked = exponents.masked_fill(~mask, -torch.inf)
    if plus_one:
        return torch.logsumexp(F.pad(masked, (0, 1), value=0.0), 1)
    empty = ~mask.any(1)
    return torch.logsumexp(masked.masked_fill(empty[:, None], 0.0), 1).masked_fill(empty, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)


PAIR_LOSSES: dict[str, PairLoss] = {
    "contrastive": PairLoss(_above, _contrastive, _above),
    "multi_similarity": PairLoss(_mine, _multi_similarity, lambda s, p, n, c: _anchors_with_both(p, n)),
    "binomial": PairLoss(_mine, _binomial, lambda s, p, n, c: _all_pairs(p, n)),
    "lifted": PairLoss(_mine, _lifted, lambda s, p, n, c: _anchors_with_both(p, n)),
    "triplet": PairLoss(_active, _triplet, _active),
}

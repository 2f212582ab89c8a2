"""k-reciprocal neighbours (Zhong, Zheng, Cao, Li, CVPR 2017, arXiv 1701.08398): images that list each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def reciprocal_neighbours(
    embeddings: Float[Tensor, "images dim"], k: int, size: int, block: int = 1024
) -> Int64[Tensor, "images size"]:
    """For every image, itself and the nearest members of its expanded k-reciprocal set, filled up with nearest images.

    The set R(i) holds the images among i's k nearest that have i among theirs. It is expanded by the set of each member
    (with k/2) of which at least two thirds lie in R(i).

    Args:
        embeddings: of length 1.
        k: neighbours that are looked at, at most images - 1.
        size: images of a group, the image itself first; at most images.
        block: rows whose similarities are held at once.

    Cost: O(images² dim) time, O(images k) memory beside one block of similarities.
    """
    count = len(embeddings)
    if size > count:
        raise ValueError(f"groups of {size} images need at least as many images, got {count}")
    k, half = min(k, count - 1), max(1, min(k, count - 1) // 2)
    depth = min(max(k + 1, size), count)
    order = torch.cat([_nearest(embeddings, start, block, depth) for start in range(0, count, block)])
    lists = [set(row) for row in order[:, : k + 1].tolist()]
    short = [set(row) for row in order[:, : half + 1].tolist()]
    ranked = order.tolist()
    small = [{j for j in row if i in short[j]} for i, row in enumerate(short)]
    groups = []
    for i in range(count):
        members = {j for j in lists[i] if i in lists[j]}
        expanded = set(members)
        for j in members:
            if len(small[j] & members) >= 2 / 3 * len(small[j]):
                expanded |= small[j]
        expanded.discard(i)
        chosen = [i, *_by_distance(embeddings, i, expanded)[: size - 1]]
        seen = set(chosen)
        chosen += [j for j in ranked[i] if j not in seen][: size - len(chosen)]
        groups.append(chosen)
    return torch.tensor(groups, device=embeddings.device)


def _nearest(embeddings: Tensor, start: int, block: int, depth: int) -> Tensor:
    """The `depth` nearest images of a block of rows, the row's own image first."""
    rows = embeddings[start : start + block]
    similarity = rows @ embeddings.T
    local = torch.arange(len(rows), device=rows.device)
    similarity[local, start + local] = torch.inf
    return similarity.topk(depth, dim=1).indices


def _by_distance(embeddings: Tensor, i: int, others: set[int]) -> list[int]:
    ids = torch.tensor(sorted(others), device=embeddings.device, dtype=torch.int64)
    return ids[(embeddings[ids] @ embeddings[i]).argsort(descending=True, stable=True)].tolist()

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
        embeddings: Embeddings of length 1.
        k: Number of nearest neighbours considered, at most images - 1.
        size: Number of images in a group, the image itself first; at most images.
        block: Number of rows whose similarities are in memory at once.

    Cost: O(images² dim) time, O(images k) memory beside one block of similarities.
    """
    count = len(embeddings)
    if size > count:
        raise ValueError(f"groups of {size} images need at least as many images, got {count}")
    k, half = min(k, count - 1), max(1, min(k, count - 1) // 2)
    num_nearest = min(max(k + 1, size), count)
    nearest = torch.cat(
        [_nearest_neighbours(embeddings, start, block, num_nearest) for start in range(0, count, block)]
    )
    nearest_sets = [set(row) for row in nearest[:, : k + 1].tolist()]
    half_sets = [set(row) for row in nearest[:, : half + 1].tolist()]
    nearest_lists = nearest.tolist()
    half_reciprocal = [{j for j in row if i in half_sets[j]} for i, row in enumerate(half_sets)]
    groups = []
    for i in range(count):
        members = {j for j in nearest_sets[i] if i in nearest_sets[j]}
        expanded = set(members)
        for j in members:
            if len(half_reciprocal[j] & members) >= 2 / 3 * len(half_reciprocal[j]):
                expanded |= half_reciprocal[j]
        expanded.discard(i)
        group = [i, *_sorted_by_similarity(embeddings, i, expanded)[: size - 1]]
        in_group = set(group)
        group += [j for j in nearest_lists[i] if j not in in_group][: size - len(group)]
        groups.append(group)
    return torch.tensor(groups, device=embeddings.device)


def _nearest_neighbours(embeddings: Tensor, start: int, block: int, depth: int) -> Tensor:
    """The `depth` nearest images of a block of rows, the row's own image first."""
    rows = embeddings[start : start + block]
    similarity = rows @ embeddings.T
    local = torch.arange(len(rows), device=rows.device)
    similarity[local, start + local] = torch.inf
    return similarity.topk(depth, dim=1).indices


def _sorted_by_similarity(embeddings: Tensor, i: int, others: set[int]) -> list[int]:
    ids = torch.tensor(sorted(others), device=embeddings.device, dtype=torch.int64)
    return ids[(embeddings[ids] @ embeddings[i]).argsort(descending=True, stable=True)].tolist()

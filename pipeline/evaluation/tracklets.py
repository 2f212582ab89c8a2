"""Mean embeddings of tracklets, from sums over their frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pipeline.neighbours.exact_cosine import slices

_FRAMES_PER_BLOCK = 4096  # converted to float64 at once


@dataclass(frozen=True)
class TrackSums:
    """Sums of the embeddings of each tracklet's frames, accumulated over batches and ranks.

    On several ranks: `TrackSums(local.tracks, ranks.sum(local.sums),
    ranks.sum(local.counts)).rows()`. Sums in the order of the frames have the same bits for any
    batch size; sums of the ranks' sums differ by rounding in float64.

    Attributes:
        tracks: Numbers of the tracklets, ascending.
        sums: float64, on the CPU.
        counts: Number of frames added to each.
    """

    tracks: Int64[np.ndarray, " tracks"]
    sums: Float64[Tensor, "tracks dim"]
    counts: Int64[Tensor, " tracks"]

    @staticmethod
    def empty(tracks: Int64[np.ndarray, " any"], dim: int) -> TrackSums:
        """Zero sums of these tracklets, given in any order and any number of times."""
        unique = np.unique(tracks)
        if not len(unique):
            raise ValueError("got no tracks: expected at least one")
        num = len(unique)
        return TrackSums(unique, torch.zeros(num, dim, dtype=torch.float64), torch.zeros(num, dtype=torch.int64))

    def add(self, embeddings: Float[Tensor, "frames dim"], tracks: Int64[np.ndarray, " frames"]) -> None:
        """Adds frames, of any tracklets in any order.

        Raises:
            ValueError: Not one tracklet a frame; other than the expected dimension; an unknown
                tracklet.
        """
        if embeddings.shape != (len(tracks), self.sums.shape[1]):
            expected = (len(tracks), self.sums.shape[1])
            raise ValueError(f"got frames {tuple(embeddings.shape)}: expected {expected}, one row a track number")
        position = np.minimum(np.searchsorted(self.tracks, tracks), len(self.tracks) - 1)
        unknown = self.tracks[position] != tracks
        if unknown.any():
            raise ValueError(
                f"got a frame of track {tracks[unknown.argmax()]}: expected one of {len(self.tracks)} others"
            )
        index = torch.from_numpy(position)
        for block in slices(len(tracks), _FRAMES_PER_BLOCK):
            self.sums.index_add_(0, index[block], embeddings[block].detach().cpu().double())
        self.counts.add_(torch.bincount(index, minlength=len(self.tracks)))

    def rows(self) -> Float64[Tensor, "tracks dim"]:
        """The mean of each tracklet's frames, at length one; tracklets ascending.

        Raises:
            ValueError: A tracklet without a frame, or with a mean that is zero or not finite.
        """
        norms = self.sums.norm(dim=1, keepdim=True)  # the mean's norm times the count, which cancels at length one
        for mask, problem in [
            (self.counts == 0, "have no frame"),
            (~((norms[:, 0] > 0) & norms[:, 0].isfinite()), "have a mean that is zero or not finite"),
        ]:
            if mask.any():
                first = self.tracks[int(mask.nonzero()[0])]
                raise ValueError(
                    f"{int(mask.sum())} of {len(self.tracks)} tracks {problem}, the first is track {first}"
                )
        return self.sums / norms


def pool_tracks(
    embeddings: Float[Tensor, "frames dim"], tracks: Int64[np.ndarray, " frames"]
) -> tuple[Int64[np.ndarray, " tracks"], Float64[Tensor, "tracks dim"]]:
    """One row a tracklet: the mean of its frames' embeddings, at length one (OSM+CAA's test on MARS and LPW).

    Returns:
        The numbers of the tracklets, ascending, and their rows.

    Raises:
        ValueError: As `TrackSums`.
    """
    pooled = TrackSums.empty(tracks, embeddings.shape[-1])
    pooled.add(embeddings, tracks)
    return pooled.tracks, pooled.rows()

"""Random generators keyed by numbers."""

from __future__ import annotations

import numpy as np
import torch


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose stream depends on the key alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) >> 1)

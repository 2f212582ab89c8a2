"""The supervised contrastive loss against explicit loops over images."""

from __future__ import annotations

import math

import torch

from methods.supcon import supcon_loss

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])  # the last image has no positive


def embeddings() -> torch.Tensor:
    drawn = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn)


def test_supcon_equals_loops_over_pairs() -> None:
    z, temperature, terms = embeddings(), 0.1, []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        total = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in others)
        if positives:
            terms.append(-sum(float(z[i] @ z[j]) / temperature - math.log(total) for j in positives) / len(positives))
    expected = torch.tensor(sum(terms) / len(terms), dtype=torch.float64)
    torch.testing.assert_close(supcon_loss(z, LABELS, temperature), expected)


def test_supcon_has_the_gradient_of_its_values() -> None:
    z = embeddings().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: supcon_loss(x, LABELS, 0.5), (z,))


def test_supcon_of_a_batch_without_positives_is_zero() -> None:
    z = embeddings().requires_grad_()
    loss = supcon_loss(z, torch.arange(6), 0.1)
    loss.backward()
    assert loss.item() == 0 and z.grad is not None and bool((z.grad == 0).all())

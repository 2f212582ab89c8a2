"""Gradients of a batch that is passed through the trunk in parts: memory for the activations of one part, and the same gradients.

The trunk runs over every part without keeping activations, the method sees the features of the whole batch, and the backward pass
runs each part again for its gradient (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021,
for any loss of the features). Each part draws the same random numbers in both passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GPU_SHARE = 0.9  # of a GPU's memory; the rest is for the method, and for what the allocator cannot use


def in_parts(
    run: Callable[[Tensor], Tensor], pixels: Tensor, images_per_pass: int | None
) -> Float[Tensor, "batch features"]:
    """Features of a batch, computed in parts where it is larger than one pass.

    Args:
        run: The trunk.
        pixels: uint8 images [B, 3, S, S].
        images_per_pass: Largest number of images of one pass; None: all of them.
    """
    if images_per_pass is None or len(pixels) <= images_per_pass:
        return run(pixels)
    parts = pixels.split(images_per_pass)
    if not torch.is_grad_enabled():
        return torch.cat([run(part) for part in parts])
    return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts])


def largest_fitting(largest: int, fits: Callable[[int], bool]) -> int:
    """The largest number of images that fits, to an eighth; 1 where nothing does.

    Args:
        largest: No more than these are asked for.
        fits: Whether a pass of so many images fits; of fewer images than of some that fit, it does too.
    """
    if fits(largest):
        return largest
    low, high = 0, largest  # low fits, high does not
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(1, low)


def fits_gpu(trunk: nn.Module, images: int, size: int, precision: str, device: torch.device) -> bool:
    """Whether a forward and a backward pass through the trunk leave room on a GPU for an optimizer's state.

    Args:
        trunk: The trunk in training mode, on the GPU; its gradients are dropped.
        images: Number of images.
        size: Side of the images in pixels.
        precision: float64, float32 or bf16.
        device: The GPU.
    """
    state = 3 * sum(p.numel() * p.element_size() for p in trunk.parameters() if p.requires_grad)  # Adam's, and DDP's
    torch.cuda.reset_peak_memory_stats(device)
    try:
        pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            trunk(pixels).float().sum().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trunk.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    return peak + state <= GPU_SHARE * torch.cuda.get_device_properties(device).total_memory

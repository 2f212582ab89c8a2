"""Methods of deep metric learning, one file each; pure PyTorch, no Ray."""

from methods.base import Batch, Context, Method, MethodConfig
from methods.baseline import Baseline

METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
}

__all__ = ["METHODS", "Batch", "Context", "Method", "MethodConfig"]

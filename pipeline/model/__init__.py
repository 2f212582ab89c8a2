"""The trunk: backbones, pooling, batch normalisation, forward-mode derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import ModelConfig
    from pipeline.model.trunk import Trunk, build_trunk

__all__ = ["ModelConfig", "Trunk", "build_trunk"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import pipeline.model` alone takes no time."""
    if name == "ModelConfig":
        from pipeline.config import ModelConfig

        return ModelConfig
    if name in ("Trunk", "build_trunk"):
        from pipeline.model import trunk

        return getattr(trunk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

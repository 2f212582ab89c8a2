"""The trunk: backbones, pooling, batch normalisation, forward-mode derivatives."""

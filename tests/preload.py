"""What a run imports when it comes to it, imported at once: by the fork server of `tests.pool`, for all its processes.

PyTorch loads its compiler at the first optimizer, numba its types at the first compiled function, and the clusterings of the
evaluation load scikit-learn. It takes three CPU seconds in every process, and a run of the tests trains for one.
"""

# ruff: noqa: F401  # imported for the sake of it
from __future__ import annotations

import pytorch_metric_learning.losses
import pytorch_metric_learning.miners
import sklearn.metrics
import torch._dynamo
from numba.core.registry import cpu_target

import pipeline.evaluation.evaluate_task
import pipeline.neighbours.kernels
import pipeline.train
import pipeline.training.loop

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()

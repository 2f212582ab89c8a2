"""raydml as a library: train a model, load it, embed images, search and measure.

    import raydml

    model = raydml.load("emoji")                     # a run, a folder, s3://..., hf://OWNER/NAME
    embeddings = model.embed("photos/")              # [N, D]: paths, a folder, images of Pillow, arrays, an iterator
    model.similarity(embeddings[:1], embeddings)     # [1, N]
    raydml.evaluate(embeddings, labels).metrics      # exact, in percent: recall@1, map@r, ...
    raydml.open_index("emoji.index").search("a.jpg") # nearest images of an index: path, class, similarity
    raydml.train("baseline/emoji", length="1 epoch") # as `python -m pipeline.train`; gives the run's result

Everything is imported when it is first used: `import raydml` alone takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.errors import RunError, UserError
    from pipeline.evaluation.arrays import Evaluation, evaluate
    from pipeline.inference.embedding_model import EmbeddingModel
    from pipeline.inference.image_inputs import ImageError
    from pipeline.inference.load_model import load_model as load
    from pipeline.searching.index import SearchHit, SearchIndex, open_index
    from raydml.training import TrainingResult, train

    __version__: str

_PLACES = {
    "load": ("pipeline.inference.load_model", "load_model"),
    "evaluate": ("pipeline.evaluation.arrays", "evaluate"),
    "train": ("raydml.training", "train"),
    "open_index": ("pipeline.searching.index", "open_index"),
    "SearchIndex": ("pipeline.searching.index", "SearchIndex"),
    "SearchHit": ("pipeline.searching.index", "SearchHit"),
    "EmbeddingModel": ("pipeline.inference.embedding_model", "EmbeddingModel"),
    "Evaluation": ("pipeline.evaluation.arrays", "Evaluation"),
    "TrainingResult": ("raydml.training", "TrainingResult"),
    "ImageError": ("pipeline.inference.image_inputs", "ImageError"),
    "RunError": ("pipeline.errors", "RunError"),
    "UserError": ("pipeline.errors", "UserError"),
}

__all__ = [
    "EmbeddingModel", "Evaluation", "ImageError", "RunError", "SearchHit", "SearchIndex", "TrainingResult", "UserError",
    "__version__", "evaluate", "load", "open_index", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("raydml")
    if name not in _PLACES:
        raise AttributeError(f"module 'raydml' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

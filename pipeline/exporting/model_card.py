"""README.md of an exported model: what it is, its figures with their protocol, how to use it; with the Hub's fields on top."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.metric_names import COUNTS, metric_title

README = "README.md"


@dataclass(frozen=True)
class Exported:
    """What an export has written, for the card and the record.

    Attributes:
        format: safetensors, onnx, torch_export or timm.
        usage: Lines of Python that embed images with it.
        facts: Sentences about the files: input, output, parity, int8.
        notes: What a user of the figures has to know.
    """

    format: str
    usage: tuple[str, ...]
    facts: tuple[str, ...]
    notes: tuple[str, ...]


def model_card(model: EmbeddingModel, exported: Exported, licence: str, repository: str | None) -> str:
    """The text of README.md.

    Args:
        model: The trained model, with the figures that are of this checkpoint.
        exported: What was written.
        licence: Identifier of the licence on the Hub, such as mit, or other.
        repository: OWNER/NAME on the Hub, if it is known.
    """
    parts = [
        f"---\n{_front_matter(model, exported, licence)}\n---\n",
        f"# {repository or model.name}\n",
        f"{_sentence(model)}\n",
        "## Use\n\n```python\n" + "\n".join(exported.usage) + "\n```\n",
        _figures(model),
        _data(model),
        "## Files\n\n" + "\n".join(f"- {fact}" for fact in exported.facts) + "\n",
        *(["## Notes\n\n" + "\n".join(f"- {note}" for note in exported.notes) + "\n"] if exported.notes else []),
        f"## Licence\n\n{_licence(licence)}\n",
    ]
    return "\n".join(parts)


def _front_matter(model: EmbeddingModel, exported: Exported, licence: str) -> str:
    """The fields that the Hub reads, as YAML; figures as its model index."""
    from huggingface_hub import EvalResult, ModelCardData

    protocol = model.figures.get("protocol", {})
    results = [
        EvalResult(
            task_type="image-feature-extraction", task_name="Image retrieval", dataset_type="image",
            dataset_name=str(protocol.get("dataset", "unknown")), dataset_split="test", metric_type=key,
            metric_name=f"{metric_title(key)}, %", metric_value=value,
        )
        for key, value in model.figures.get("final", {}).items() if key not in COUNTS
    ]  # fmt: skip
    data = ModelCardData(
        license=licence,
        library_name="timm" if exported.format == "timm" else "raydml",
        pipeline_tag="image-feature-extraction",
        tags=["deep-metric-learning", "image-retrieval", "embeddings", exported.format.replace("_", "-")],
        model_name=model.name,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n").strip()


def _sentence(model: EmbeddingModel) -> str:
    settings = model.settings
    return (
        f"Embeddings of images for retrieval: images of the same class lie close together, also of classes never seen in "
        f"training. {settings.model.backbone}, {model.transforms.size}×{model.transforms.size} pixels, {model.dim} dimensions, "
        f"compared by {'their cosine' if model.distance == 'cosine' else 'Euclidean distance'}; trained with raydml, method "
        f"{settings.method}."
    )


def _figures(model: EmbeddingModel) -> str:
    """Figures and protocol, or that there are none."""
    final: Mapping[str, float] = model.figures.get("final", {})
    if not final:
        return "## Figures\n\nNot measured on test classes.\n"
    frozen: Mapping[str, float] = model.figures.get("frozen", {})
    names = [name for name in final if name not in COUNTS]
    rows = [(metric_title(n), f"{frozen[n]:.2f}" if n in frozen else "", f"{final[n]:.2f}") for n in names]
    text = (
        f"## Figures\n\nTest classes, never seen in training, {final.get('queries', 0):,.0f} queries, in percent:\n\n"
    )
    text += _table(("", "frozen backbone", "this model"), rows)
    by_dim: Mapping[str, Mapping[str, float]] = model.figures.get("by_dim", {})
    if by_dim:
        text += "\nThe first dimensions alone, at length one:\n\n"
        text += _table(
            ("dimensions", *map(metric_title, names)),
            [(dim, *(f"{found[n]:.2f}" if n in found else "" for n in names)) for dim, found in by_dim.items()],
        )
    protocol = [(key.replace("_", " "), _public(value)) for key, value in model.figures["protocol"].items()]
    return f"{text}\nProtocol:\n\n{_table(('', ''), protocol)}"


def _data(model: EmbeddingModel) -> str:
    """What it was trained on."""
    dataset = model.figures.get("protocol", {}).get("dataset")
    of = f" of {dataset}" if dataset else ""
    return f"## Data\n\nTrained on {model.classes:,} classes{of}.\n"


def _licence(licence: str) -> str:
    if licence in ("unknown", "other"):
        return "Not stated. Besides the publisher's own terms, those of the pretrained weights and of the training images may apply."
    return f"{licence}, as stated by the publisher. Terms of the pretrained weights and of the training images may apply as well."


def _public(value: Any) -> str:
    """A value of the protocol; of a path, the name of the file."""
    text = str(value)
    return posixpath.basename(text) if text.startswith(("/", "~", "s3://")) else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

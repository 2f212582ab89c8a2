"""Methods of deep metric learning, one file each; pure PyTorch, no Ray."""

from methods import plugins
from methods.base import Batch, Context, Method, MethodConfig
from methods.baseline import Baseline
from methods.gca_hng import GcaHng
from methods.intra_batch import IntraBatch
from methods.mmsi import Mmsi
from methods.osm_caa import OsmCaa
from methods.smart_mining import SmartMining

METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "gca_hng": GcaHng,
    "intra_batch": IntraBatch,
    "mmsi": Mmsi,
    "osm_caa": OsmCaa,
    "smart_mining": SmartMining,
}


def method_class(name: str) -> type[Method]:
    """The method of a name: one of METHODS, an entry point of an installed package, or an import string.

    Raises:
        ValueError: One line: there is none, or it is no method.
    """
    if name in METHODS:
        return METHODS[name]
    if plugins.is_import_string(name):
        return plugins.load(name, "method", Method)
    point = plugins.method_entry_points().get(name)
    if point is None:
        raise ValueError(f"there is no method {name!r}")
    return plugins.load(point.value, f"method {name!r}, the entry point", Method)


def method_names() -> list[str]:
    """Names of METHODS and of the methods of installed packages, sorted."""
    return sorted({*METHODS, *plugins.method_entry_points()})


__all__ = ["METHODS", "Baseline", "Batch", "Context", "Method", "MethodConfig", "method_class", "method_names"]

"""Methods of deep metric learning, one file each; pure PyTorch, no Ray."""

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

__all__ = ["METHODS", "Baseline", "Batch", "Context", "Method", "MethodConfig"]

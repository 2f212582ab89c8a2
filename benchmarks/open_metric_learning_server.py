"""The other side of benchmarks/open_metric_learning.py, run by the Python of its virtual environment: `SERVER FOLDER`.

Reads the embeddings and labels of the folder, prints its versions, and answers each line, a list of the k of CMC@k, with the
figures and the wall and CPU seconds that they took.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import oml
import torch
from oml.functional.knn import batched_knn
from oml.functional.metrics import calc_retrieval_metrics

MAP_AT = 4


def main(folder: str) -> None:
    torch.set_num_threads(1)
    embeddings, labels = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ("x", "y"))
    ids = torch.arange(len(labels))
    versions = {"version": oml.__version__, "numpy": np.__version__, "torch": torch.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        cmc_at = tuple(json.loads(line))
        wall, cpu = time.perf_counter(), time.process_time()
        _, found, relevant = batched_knn(embeddings, ids, ids, max(*cmc_at, MAP_AT), labels_gt=labels)
        metrics = calc_retrieval_metrics(
            found, relevant, cmc_top_k=cmc_at, precision_top_k=(), map_top_k=(MAP_AT,), verbose=False
        )
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        figures = {f"cmc@{k}": float(metrics["cmc"][k]) for k in cmc_at} | {"map": float(metrics["map"][MAP_AT])}
        print(json.dumps({"seconds": seconds, **figures}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Rows about nodes, made from what they say: versions, devices, storage, disks, limits, clocks. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.diagnosis.node_facts import NodeFacts
from pipeline.diagnosis.rows import Row, graded, size, together

MIN_SHM_BYTES = 256 << 20  # Ray keeps blocks of pixels there, and writes them to a disk where it is smaller
MIN_OPEN_FILES = 1024
GOOD_OPEN_FILES = 4096
CLOCK_WARNING_S = 2.0  # from which on times in logs and listings mislead
CLOCK_LIMIT_S = 600.0  # object storage refuses requests of a clock that is 15 minutes off
_ESSENTIAL = ("raydml", "torch", "ray")  # another version of these gives other figures, or cannot be talked to


def each(nodes: Sequence[NodeFacts], row: Callable[[NodeFacts], Row]) -> list[Row]:
    """A row of every node that has answered; equal ones together."""
    return together({node.node: row(node) for node in nodes if node.error is None})


def answers(nodes: Sequence[NodeFacts]) -> list[Row]:
    """Nodes that gave no facts; no row if there is none."""
    change = "start the node again or remove it from the cluster; see that its Python finds this program (working_dir of the job)"
    rows = {n.node: Row("node", "fails", n.error, "an answer", change) for n in nodes if n.error is not None}
    return [Row(r.check, r.status, f"{node}: {r.found}", r.expected, r.change) for node, r in rows.items()]


def versions(nodes: Sequence[NodeFacts], driver: NodeFacts) -> list[Row]:
    """Python, this program and its packages on every node, beside the driver's."""

    def row(node: NodeFacts) -> Row:
        broken = "; ".join(f"{name}: {reason}" for name, reason in node.errors.items())
        if broken:
            return graded(
                "imports", broken, "every package can be imported", fails="install raydml's dependencies on this node"
            )
        different = [name for name, version in driver.versions.items() if node.versions.get(name) != version]
        minor = [n for n in different if n == "python" and _minor(node.versions[n]) == _minor(driver.versions[n])]
        serious = [n for n in different if n in (*_ESSENTIAL, "python") and n not in minor]
        found = ", ".join(f"{name} {node.versions.get(name)}" for name in different or node.versions)
        expected = ", ".join(f"{name} {driver.versions[name]}" for name in different) or "those of the driver"
        return graded(
            "versions", found, expected,
            fails="install the same versions on all nodes: one image for the whole cluster" if serious else "",
            warning="install the same versions on all nodes" if different else "",
        )  # fmt: skip

    return each(nodes, row)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def devices(nodes: Sequence[NodeFacts], gpus_per_worker: float | int, server_gpus: float | int) -> list[Row]:
    """GPUs that torch and faiss see, beside each other and beside what the node offers to Ray.

    Args:
        nodes: The nodes.
        gpus_per_worker: GPUs of each worker.
        server_gpus: GPUs of each mining server.
    """
    wanted = gpus_per_worker > 0 or server_gpus > 0
    able = [n for n in nodes if n.error is None and n.torch_gpus]

    def row(node: NodeFacts) -> Row:
        torch, faiss, offered = len(node.torch_gpus), node.faiss_gpus, node.ray_gpus
        kinds = sorted({f"{name} {size(num_bytes)}" for name, num_bytes in node.torch_gpus})
        found = f"torch {torch}, faiss {faiss}" + ("" if offered is None else f", Ray {offered:g}")
        found += f" ({', '.join(kinds)})" if kinds else ""
        fails = warning = ""
        if offered is not None and offered > torch:
            fails = (
                "torch sees fewer GPUs than the node offers to Ray: install the driver, and a torch wheel with its CUDA"
            )
        elif offered is not None and offered < torch and wanted:
            warning = "Ray offers fewer GPUs than there are: start the node with --num-gpus"
        if server_gpus and faiss < torch:
            warning = warning or "faiss sees fewer GPUs than torch: install faiss-gpu instead of faiss-cpu"
        expected = "the same number" if wanted or torch or offered else "none, as the recipe asks for none"
        return graded("GPUs", found, expected, fails=fails, warning=warning)

    rows = each(nodes, row)
    if wanted and not able:
        change = "set runtime.gpus_per_worker and mining.gpus to 0, or use a machine with GPUs"
        if any(n.ray_gpus is not None for n in nodes):  # an autoscaler may start nodes that have them
            rows.append(
                Row(
                    "GPUs",
                    "warning",
                    "none on the nodes that are up",
                    "at least one",
                    f"see 'resources'; else {change}",
                )
            )
        else:
            rows.append(Row("GPUs", "fails", "none", "at least one", change))
    return rows


def storage(nodes: Sequence[NodeFacts], uri: str, needed_bytes: int | None) -> list[Row]:
    """Whether every node writes to the storage and sees what the driver wrote, and its free space.

    Args:
        nodes: The nodes.
        uri: The storage.
        needed_bytes: Checkpoints of the run; None: not known.
    """
    many = len(nodes) > 1

    def row(node: NodeFacts) -> Row:
        expected = "writable, and the same folder on every node" if many else "writable"
        if node.storage_error is not None:
            change = "check the path, its permissions and mounts; for s3:// the credentials of the node"
            return graded("storage", node.storage_error, expected, fails=change)
        if not node.sees_probe:
            found = f"{uri} is another folder here: a file that the driver wrote is missing"
            return graded(
                "storage", found, expected, fails="set storage to s3://... or to a folder that all nodes mount"
            )
        return graded("storage", f"{uri} is written and read", expected)

    rows = each(nodes, row)
    writable = [n for n in nodes if n.error is None and n.storage_error is None]
    free = [n.storage_free_bytes for n in writable if n.storage_free_bytes is not None]
    if free:
        least = min(free)
        expected = "room for checkpoints" + ("" if needed_bytes is None else f": {size(needed_bytes)}")
        short = needed_bytes is not None and least < needed_bytes
        tight = least < max(1 << 30, 2 * (needed_bytes or 0))
        rows.append(
            graded(
                "disk: storage",
                f"{size(least)} free",
                expected,
                fails="make room, set checkpoint.keep to fewer, or set storage to another disk" if short else "",
                warning="make room" if tight else "",
            )
        )
    return rows


def cache(nodes: Sequence[NodeFacts], folder: str, split_bytes: int | None, max_bytes: int) -> list[Row]:
    """Room for each node's copy of the training split.

    Args:
        nodes: The nodes.
        folder: `cache.folder`, or its default.
        split_bytes: Size of the training split; None: the dataset is not prepared yet.
        max_bytes: `cache.max_bytes`.
    """
    if split_bytes is not None and split_bytes > max_bytes:
        found = f"the training split has {size(split_bytes)}, cache.max_bytes allows {size(max_bytes)}"
        change = "raise cache.max_bytes if the disks have room: images are read from the store in every epoch"
        return [Row("disk: cache", "warning", found, "a copy on every node", change)]

    def row(node: NodeFacts) -> Row:
        expected = (
            "size not known before the dataset is prepared" if split_bytes is None else f"{size(split_bytes)} free"
        )
        if node.cache_error is not None:
            return graded(
                "disk: cache", node.cache_error, expected, fails="set cache.folder to a folder that can be written"
            )
        if node.cached:
            return graded("disk: cache", f"{folder} has the copy", expected)
        short = split_bytes is not None and node.cache_free_bytes < split_bytes
        change = "make room, set cache.folder to a larger disk, or set cache.max_bytes to 0 (images are then read from the store)"
        return graded(
            "disk: cache", f"{folder}: {size(node.cache_free_bytes)} free", expected, fails=change if short else ""
        )

    return each(nodes, row)


def limits(nodes: Sequence[NodeFacts], uses_ray: bool) -> list[Row]:
    """/dev/shm and the limit of open files."""

    def shm(node: NodeFacts) -> Row:
        expected = f"{size(MIN_SHM_BYTES)} or more"
        change = "enlarge it (docker run --shm-size=2g; an emptyDir of medium Memory on Kubernetes): Ray's objects go to a disk else"
        if node.shm_bytes is None:
            return graded("/dev/shm", "none", expected, warning=change)
        small = min(node.shm_bytes, node.shm_free_bytes) < MIN_SHM_BYTES
        found = f"{size(node.shm_bytes)}, {size(node.shm_free_bytes)} free"
        return graded("/dev/shm", found, expected, warning=change if small else "")

    def files(node: NodeFacts) -> Row:
        soft, hard = node.open_files
        reachable = hard if uses_ray else soft  # Ray raises its own
        change = f"raise it: ulimit -n {GOOD_OPEN_FILES}, or LimitNOFILE of the service"
        return graded(
            "open files", f"{soft:,} (at most {hard:,})", f"{MIN_OPEN_FILES:,} or more",
            warning=change if reachable < MIN_OPEN_FILES else "",
        )  # fmt: skip

    return [*(each(nodes, shm) if uses_ray else []), *each(nodes, files)]


def clocks(nodes: Sequence[NodeFacts], object_storage: bool) -> list[Row]:
    """Clocks of the nodes against the driver's."""

    def row(node: NodeFacts) -> Row:
        off, error = node.clock_s, node.clock_error_s
        least = max(0.0, abs(off) - error)
        change = "set the clock by NTP or chrony"
        hard = object_storage and least > CLOCK_LIMIT_S
        found = (
            "not measured"
            if error == float("inf")
            else f"{off:+.1f} s"
            if least > CLOCK_WARNING_S
            else f"within {CLOCK_WARNING_S:g} s"
        )
        return graded(
            "clock", found, f"within {CLOCK_WARNING_S:g} s of the driver's",
            fails=f"{change}: object storage refuses requests of a wrong time" if hard else "",
            warning=change if least > CLOCK_WARNING_S or error == float("inf") else "",
        )  # fmt: skip

    return each(nodes, row)


def authentication(open_to_all: bool, address: str, nodes: Sequence[NodeFacts]) -> Row:
    """Whether the cluster asks for a token, and whom it listens to.

    Args:
        open_to_all: The control store answered a request without a token.
        address: Its address.
        nodes: The nodes; the one that holds the control store says what it listens on.
    """
    found = sorted({a for node in nodes for a in node.gcs_addresses}) or [address.rpartition(":")[0]]
    local = all(a.startswith("127.") or a in ("::1", "localhost") for a in found)
    change = "start the cluster with RAY_AUTH_MODE=token and a token (ray get-auth-token --generate), on all nodes"
    return graded(
        "authentication",
        f"{'no token is asked for' if open_to_all else 'a token is asked for'}, listens on {', '.join(found)}",
        "a token: whoever reaches an open cluster can run code on it",
        fails=change if open_to_all and not local else "",
        warning=change if open_to_all else "",
    )

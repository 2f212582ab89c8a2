"""Plans of the steps to come, and the pixels of their images: one loader serves many steps, across epochs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import islice

from torch import Tensor

from methods import Context, Method
from methods.config import Length
from methods.plans import Plan
from pipeline.config import RuntimeConfig
from pipeline.data.copy_ahead import on_device
from pipeline.data.loader import ImageSource, LoadRequest, load
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks
from pipeline.runs.checkpoint import TrainingState

SEGMENT_STEPS = 512  # where plans can be made ahead, one loader serves at least this many steps


class PlannedBatches:
    """Plans of the steps to come, and the pixels of this rank's slots.

    Args:
        method: The method, which makes the plans.
        context: The context that plans are made from.
        samples: The training set, to whose positions the ids of a plan refer.
        source: The source of the pixels.
        length: Length of the run.
        runtime: The runtime section of the config, for the loader.
        ranks: This worker's rank and the collectives.
        start_epoch: Called before the plan of an epoch that cannot be recomputed.

    Attributes:
        stored: Plan of the current epoch where it cannot be recomputed; checkpoints contain it.
    """

    def __init__(
        self,
        method: Method,
        context: Context,
        samples: Samples,
        source: ImageSource,
        length: Length,
        runtime: RuntimeConfig,
        ranks: Ranks,
        start_epoch: Callable[[int], None],
    ) -> None:
        self.method = method
        self.context = context
        self.samples = samples
        self.source = source
        self.length = length
        self.runtime = runtime
        self.ranks = ranks
        self.start_epoch = start_epoch
        self.stored: Plan | None = None

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch that has begun."""
        return self.stored or self.method.plan(epoch, self.context)

    def plans_ahead(self, progress: TrainingState) -> list[tuple[int, Plan]]:
        """The current epoch's plan, and the following ones where they are pure, up to a segment's length."""
        epoch, method = progress.epoch, self.method
        if method.plan_is_stored:
            if self.stored is None:
                self.start_epoch(epoch)
                self.stored = method.plan(epoch, self.context)
            return [(epoch, self.stored)]
        plans: list[tuple[int, Plan]] = []
        steps_ahead, steps_wanted = -progress.step_in_epoch, float(SEGMENT_STEPS)
        if self.length.unit == "steps":
            steps_wanted = min(steps_wanted, self.length.value - progress.step)
        while steps_ahead < steps_wanted:
            if self.length.unit == "epochs" and epoch >= self.length.value:
                break
            plans.append((epoch, method.plan(epoch, self.context)))
            steps_ahead += len(plans[-1][1])
            epoch += 1
        return plans

    def pixels(self, plans: list[tuple[int, Plan]], progress: TrainingState) -> Generator[Tensor, None, None]:
        """Pixels of this rank's slots for the steps to come, uint8 [slots, 3, S, S] each; on a GPU, if that is the device."""
        length = self.length
        max_steps = max(0, round(length.value) - progress.step) if length.unit == "steps" else None
        requests = islice(self.requests(plans, progress.step, progress.step_in_epoch), max_steps)
        pixels = load(self.source, requests, self.runtime.loader, self.runtime.loader_cpus)
        return on_device(pixels, self.context.device)

    def requests(self, plans: list[tuple[int, Plan]], step: int, row: int) -> Iterator[LoadRequest]:
        """Load requests of this rank's slots, from a row of the first plan on; lazy, because plans are long."""
        for epoch, plan in plans:
            shard = self.ranks.slice(plan.ids.shape[1])
            for ids in plan.ids[row:, shard]:
                yield LoadRequest(self.samples.ids[ids], (epoch, step, shard.start))
                step += 1
            row = 0

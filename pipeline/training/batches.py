"""Plans that are known ahead, and the pixels of their steps: one loader serves many steps, across epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from methods import Context, Method
from methods.config import Length
from methods.plans import Plan
from pipeline.config import RuntimeConfig
from pipeline.data.loader import ImageSource, LoadRequest, load
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks
from pipeline.runs.checkpoint import TrainingState

SEGMENT_STEPS = 512  # plans that are known ahead are loaded by one pipeline of at least so many steps


class PlannedBatches:
    """Plans of the steps to come, and the pixels of this rank's slots.

    Args:
        method: makes the plans.
        context: what a plan may look at.
        samples: the training set, whose positions a plan names.
        source: where the pixels come from.
        length: of the run.
        runtime: how pixels are loaded.
        ranks: this worker's place.
        start_epoch: called before the plan of an epoch that cannot be recomputed.

    Attributes:
        stored: plan of the current epoch where it cannot be recomputed; a checkpoint holds it.
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
        self.method, self.context, self.samples, self.source = method, context, samples, source
        self.length, self.runtime, self.ranks, self.start_epoch = length, runtime, ranks, start_epoch
        self.stored: Plan | None = None

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch that has begun."""
        return self.stored or self.method.plan(epoch, self.context)

    def known_plans(self, progress: TrainingState) -> list[tuple[int, Plan]]:
        """The current epoch's plan, and the following ones where they are pure, up to a segment's length."""
        epoch, method = progress.epoch, self.method
        if method.plan_is_stored:
            if self.stored is None:
                self.start_epoch(epoch)
                self.stored = method.plan(epoch, self.context)
            return [(epoch, self.stored)]
        plans: list[tuple[int, Plan]] = []
        known, wanted = -progress.step_in_epoch, float(SEGMENT_STEPS)
        if self.length.unit == "steps":
            wanted = min(wanted, self.length.value - progress.step)
        while known < wanted:
            if self.length.unit == "epochs" and epoch >= self.length.value:
                break
            plans.append((epoch, method.plan(epoch, self.context)))
            known += len(plans[-1][1])
            epoch += 1
        return plans

    def pixels(self, plans: list[tuple[int, Plan]], progress: TrainingState) -> Iterator[Tensor]:
        """Pixels of this rank's slots for the steps to come, uint8 [slots, 3, S, S] each."""
        p, length = progress, self.length
        most = max(0, round(length.value) - p.step) if length.unit == "steps" else None
        items = islice(self.items(plans, p.step, p.step_in_epoch), most)
        return load(self.source, items, self.runtime.loader, self.runtime.loader_cpus)

    def items(self, plans: list[tuple[int, Plan]], step: int, row: int) -> Iterator[LoadRequest]:
        """This rank's slots from a row of the first plan on, each made when it is asked for: plans are long."""
        for epoch, plan in plans:
            own = self.ranks.slice(plan.ids.shape[1])
            for ids in plan.ids[row:, own]:
                yield LoadRequest(self.samples.ids[ids], (epoch, step, own.start))
                step += 1
            row = 0

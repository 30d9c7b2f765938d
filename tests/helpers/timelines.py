"""A timeline as a synchronous run writes it."""

from __future__ import annotations

import time

from forerun.tracking.timeline import IN_FLIGHT, LEARNER, Timeline


def write_steps(timeline: Timeline, steps: range) -> None:
    """A load, a generation and a training per step."""
    for step in steps:
        engine = timeline.engine("engine")
        with timeline.span(LEARNER, "generation", step):
            engine.enter("load", step, step - 1)
            time.sleep(0.002)
            engine.enter("generate", step, step - 1)
            timeline.counts(IN_FLIGHT, timeline.now_ns(), [(i / 1e6, 40 - i) for i in range(40)], step)
            time.sleep(0.002)
            engine.enter("idle", step)
        with timeline.span(LEARNER, "train", step):
            time.sleep(0.003)
        timeline.flush()

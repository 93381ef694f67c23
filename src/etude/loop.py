"""The training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etude.outputs import TrainOutput
    from etude.run import Run


def train(run: Run) -> TrainOutput:
    """Minimise L(A, B) = -(1/N) * sum_t log p(y_t | x, y_<t; W0 + (alpha/r) B A) over the adapters (A, B).

    N is the number of supervised items of the step, counted over all its micro-batches (Hu et al., arXiv 2106.09685).
    """
    run.events.train_begin()
    for step in run.remaining_steps():  # knows its epoch; going to any step costs nothing
        run.events.step_begin(step)
        micro_batches, num_items = run.batches.of_next_step()
        loss = run.gradient.zero()
        for micro_batch in micro_batches:
            loss += run.gradient.accumulate(micro_batch, num_items)  # forward and backward
            run.events.micro_batch_end(micro_batch)
        norm = run.gradient.reduce_and_clip()
        run.gradient.require_finite(loss, norm, step)  # stops here, before the update
        run.update.apply(step)  # the learning rate is a function of the step
        run.events.step_end(step, loss, norm)  # logging, evaluation, checkpoints, stop requests
    return run.finish()

"""What training does when numbers go bad: stop at the last good state, or leave a step out, and say why."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from tapeless.engine import Steps
from tapeless.errors import NumericsError
from tapeless.memory import SNAPSHOTS
from tapeless.optim import learning_rates
from tapeless.programs import BAD_LOSS, BAD_NORM, LOSS_SPIKE, NORM_SPIKE
from tapeless.replay import described, first_not_finite

if TYPE_CHECKING:
    from tapeless.job import Job

PIECE = 2**20  # numbers looked at in one go
MOST_SKIPPED = 100  # in a row; then nothing is learnt any more
EXPLAINED = 3  # skipped steps that are done again to find the op


class Snapshot:
    """A state to return to: the step, the random numbers and what the optimiser changes."""

    def __init__(self, job: Job, room: Snapshot | None = None):
        state = job.model.engine.state
        self.step, self.rng = job.step, job.rng.state()
        self.arrays: dict[str, np.ndarray] = (
            {name: np.empty_like(array) for name, array in state.items()} if room is None else room.arrays
        )
        for name, array in state.items():
            self.arrays[name][:] = array

    def restore(self, job: Job) -> None:
        job.step = self.step
        job.rng.restore(self.rng)
        for name, array in job.model.engine.state.items():
            array[:] = self.arrays[name]


class Guard:
    """Looks at what steps gave. `skipped` says by step why it was left out, until that is logged."""

    def __init__(self, job: Job):
        self._job = job
        self.small = job.model.engine.params.nbytes <= SNAPSHOTS
        self.skipped: dict[int, str] = {}
        self._explanations = 0
        self._good: deque[Snapshot] = deque()
        t, engine = job.training, job.model.engine
        engine.optimiser.limits[:] = t.watches, t.spike

    def keep(self) -> None:
        """Remember the present state as one to go back to, in place of the older of two."""
        if self.small:
            older = self._good.popleft() if len(self._good) == 2 else None
            self._good.append(Snapshot(self._job, older))

    def undo(self) -> bool:
        """Go back to the newest state that is remembered. False if there is none: the model is too large."""
        if self._good:
            self._good[-1].restore(self._job)
        return bool(self._good)

    def check(self, steps: Steps) -> str:
        """Look at the steps that were just done: "", or what is to be told of the last one, which is left
        out. Where it may not be, or the steps spoilt the model, go back to the last good state, save it, and
        raise `NumericsError`.

        A state is good if a step from it gives a finite loss and a finite state: hence two snapshots,
        the older one known to be good. From there the steps are done again one by one, so that where
        training ends up does not depend on how many are done at once. Of a large model no snapshots
        are kept: the last good state is the one that was saved. A spike leaves the state before it good.
        """
        job, skips = self._job, self._job.training.bad_steps == "skip"
        if steps.wrong in (LOSS_SPIKE, NORM_SPIKE) and not skips:
            self._stop_at_spike(steps)
        fatal = steps.wrong and not skips
        if self.small and (fatal or not self.finite()):
            self._go_back(steps.losses)
        if fatal:
            self._give_up(f"{self._reason(steps)} at step {job.step:,}. {self._explained(job.step)}")
        job.record(steps.losses)
        self.keep()
        job.settled = True
        return self._skip(steps) if steps.wrong else ""

    def finite(self) -> bool:
        state = self._job.model.engine.state
        return all(
            bool(np.isfinite(state[name][i : i + PIECE]).all())
            for name in ("params", "m", "v")
            for i in range(0, state[name].size, PIECE)
        )

    # ------------------------------------------------------------ leaving out, stopping

    def _skip(self, steps: Steps) -> str:
        job, why = self._job, self._reason(steps)
        self.skipped[job.step] = why
        if job.model.engine.optimiser.means[3] >= MOST_SKIPPED:
            job.save()
            self._give_up(f"{MOST_SKIPPED} steps in a row were bad: {why} at step {job.step:,}.")
        explained = self._explanations < EXPLAINED and steps.wrong in (BAD_LOSS, BAD_NORM)
        self._explanations += explained
        more = self._explained(job.step) if explained else self._done_on()
        return f"step {job.step:,} is skipped: {why}. {more}"

    def _stop_at_spike(self, steps: Steps) -> NoReturn:
        job, why = self._job, self._reason(steps)
        message = f"{why} at step {job.step:,}. {self._done_on()}"
        job.rewind(len(steps.losses) - 1)
        job.record(steps.losses[:-1])
        job.save()
        self._give_up(message, "bad_steps=skip, a larger spike or ")

    def _go_back(self, losses: np.ndarray) -> NoReturn:
        job, skips = self._job, self._job.training.bad_steps == "skip"
        job.record(losses)
        end, good = job.step, self._good[0]
        good.restore(job)
        while True:
            here, (steps, _) = Snapshot(job), job.advance(1)
            if (steps.wrong and not skips) or not self.finite():
                break
            good = here
        what = self._reason(steps) if steps.wrong else "the update overflows"
        here.restore(job)
        message = f"{what} at step {job.step + 1:,}. {self._explained(job.step + 1)}"
        good.restore(job)
        job.forget(end - job.step)
        self.skipped = {step: why for step, why in self.skipped.items() if step <= job.step}
        self._give_up(message)

    def _give_up(self, message: str, before: str = "") -> NoReturn:
        job = self._job
        lr = f"{before}a smaller lr (it was {job.training.lr:g})."
        raise NumericsError(message + (job.kept(f"resume it with {lr}") or f" Try {lr}"))

    def overflowed(self) -> NoReturn:
        self._give_up(f"the update overflows by step {self._job.step:,}.")

    # ------------------------------------------------------------ in words

    def _reason(self, steps: Steps) -> str:
        job = self._job
        loss, norm, means = steps.losses[-1], steps.norms[-1], job.model.engine.optimiser.means
        times = f"is more than {job.training.spike:g} times its mean of late,"
        return {
            BAD_LOSS: f"the loss is {loss}",
            BAD_NORM: f"the gradient's norm is {norm}",
            LOSS_SPIKE: f"the loss, {loss:.4g}, {times} {means[1]:.4g},",
            NORM_SPIKE: f"the gradient's norm, {norm:.4g}, {times} {means[2]:.4g},",
        }[steps.wrong]

    def _done_on(self) -> str:
        """What the last step was done on."""
        job = self._job
        return f"It was on {described(job.data, Path(str(job.about['data'])).name, job.last)}."

    def _explained(self, number: int) -> str:
        """The same, and where the numbers of that step, of this number, go wrong: the state is again the
        one before it."""
        job, engine = self._job, self._job.model.engine
        stream, spans = job.data.train.take(job.last)
        step = stream, spans, float(learning_rates(job.training, number - 1, 1)[0])
        found = first_not_finite(
            job.model.config, engine.state, engine.optimiser.constants, step, job.program, job.longest
        )
        return f"{self._done_on()} {found}"

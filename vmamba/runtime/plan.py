"""How long a run is and where it pauses: a round of training ends in a record, and where due in an evaluation."""

from dataclasses import dataclass

from yacs.config import CfgNode


@dataclass(frozen=True)
class Plan:
    """A run in optimiser steps.  By epochs a round is an epoch; by steps it is EVAL_STEPS of them."""

    steps_per_epoch: int
    steps: int  # of the whole run
    warmup_steps: int
    round_steps: int
    rounds_per_evaluation: int
    rounds_per_save: int

    @property
    def epochs(self) -> int:
        """Passes over the images, the last one perhaps in part."""
        return -(-self.steps // self.steps_per_epoch)

    def round_end(self, step: int) -> int:
        """Where the round ends that the step after `step` completed ones belongs to."""
        return min((step // self.round_steps + 1) * self.round_steps, self.steps)

    def evaluates(self, step: int) -> bool:
        """Whether the round that ends at `step` is evaluated."""
        return step >= self.steps or self._rounds(step) % self.rounds_per_evaluation == 0

    def saves(self, step: int) -> bool:
        """Whether the round that ends at `step` is saved."""
        return step >= self.steps or self._rounds(step) % self.rounds_per_save == 0

    def evaluations_left(self, step: int) -> int:
        """From `step` to the end."""
        every = self.round_steps * self.rounds_per_evaluation
        return self.steps // every - step // every + (self.steps % every > 0)

    def epoch(self, step: int) -> float:
        """Passes over the images, whole ones as an integer."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest / self.steps_per_epoch if rest else whole

    def _rounds(self, step: int) -> int:
        """Up to `step`, the one in progress included."""
        return -(-step // self.round_steps)


def build_plan(config: CfgNode, steps_per_epoch: int) -> Plan:
    train = config.TRAIN
    return Plan(
        steps_per_epoch=steps_per_epoch,
        steps=train.STEPS or train.EPOCHS * steps_per_epoch,
        warmup_steps=train.WARMUP_STEPS or train.WARMUP_EPOCHS * steps_per_epoch,
        round_steps=config.EVAL_STEPS or steps_per_epoch,
        rounds_per_evaluation=config.EVAL_FREQ,
        rounds_per_save=config.SAVE_FREQ,
    )

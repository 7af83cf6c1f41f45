"""The two stages: exploration, then convergence: a narrower clip and confidence-weighted rewards. The switch happens once."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import StagesConfig

DECAY = 0.9


@dataclass
class Stages:
    """Stage 2 begins when the running success on the sampled problems is high and flat, or at a share of the budget at the latest."""

    config: StagesConfig
    total_steps: int
    stage: int = 1
    switched_at: int | None = None
    reason: str = ""
    success: float | None = None
    history: list[float] = field(default_factory=list)

    def update(self, step: int, success: float) -> bool:
        """Takes the mean outcome of a step's rollouts; True when this is the step after which stage 2 begins."""
        self.success = success if self.success is None else DECAY * self.success + (1 - DECAY) * success
        window = self.config.switch_window
        self.history = [*self.history, self.success][-(window + 1) :]
        if not self.config.two or self.stage == 2:
            return False
        slope = self.history[-1] - self.history[0]
        if len(self.history) > window and self.success >= self.config.switch_success and slope < self.config.switch_slope:
            self.reason = f"success {self.success:.2f} >= {self.config.switch_success} and its gain {slope:.3f} over {window} steps is small"
        elif step >= self.config.switch_share * self.total_steps:
            self.reason = f"{self.config.switch_share:.0%} of the steps are done"
        else:
            return False
        self.stage, self.switched_at = 2, step
        return True

    def state(self) -> dict:
        return {k: getattr(self, k) for k in ("stage", "switched_at", "reason", "success", "history")}

    def load(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value)

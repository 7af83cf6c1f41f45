"""One vLLM server for all processes of a job: rank 0 starts it, where no URL is given, and sends it the weights; every rank asks it for its own
share of the rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RolloutConfig
from ..policy import Policy
from .server import ServerEngine

if TYPE_CHECKING:
    from ..ranks import Ranks


class SharedServerEngine(ServerEngine):
    """Made and synced by every rank together; `generate` may be called by any of them alone."""

    def __init__(self, policy: Policy, eos_ids: list[int], settings: RolloutConfig, directory: Path, ranks: Ranks):
        self.ranks = ranks
        if ranks.leads:
            super().__init__(policy, eos_ids, settings, directory)
        url = ranks.of_leader(lambda: self.client.url)
        if not ranks.leads:
            super().__init__(policy, eos_ids, replace(settings, server=replace(settings.server, url=url)), directory)

    def _transfer(self, settings: RolloutConfig, directory: Path):
        return super()._transfer(settings, directory) if self.ranks.leads else None

    def sync(self) -> None:
        with self.ranks.whole(self.policy):
            self.run, self.loaded = self.ranks.of_leader(self._sent)

    def _sent(self) -> tuple[str, int | None]:
        super()._send()
        return self.run, self.loaded

    def _send(self) -> None:
        """Of rank 0 alone, which evaluates between two steps with weights that the others will be told of."""
        if self.ranks.leads:
            super()._send()
        assert self.loaded == self.policy.version, "the ranks' policies change together, and sync comes before a step's rollouts"

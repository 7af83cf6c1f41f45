"""ACPO inside TRL: `ACPOTrainer(GRPOTrainer)` and `ACPOConfig(GRPOConfig)`. See docs/integrations/trl.md.

TRL's private methods move between releases, so this package refuses to be imported beside a TRL that it was not tested with.
"""

from .compat import check

check()

from .config import ACPOConfig  # noqa: E402
from .trainer import ACPOTrainer  # noqa: E402

__all__ = ["ACPOConfig", "ACPOTrainer"]

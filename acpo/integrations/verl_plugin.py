"""The entry point of the group `verl.plugins`: importing it registers the trainer. verl passes over a plug-in that fails to load without a word,
so what went wrong is printed here."""

import sys

from .verl import register

try:
    ACPOTrainer = register()
except Exception as error:
    print(f"acpo.integrations.verl was not loaded, so trainer_mode=acpo_sync is unknown: {type(error).__name__}: {error}", file=sys.stderr)
    raise

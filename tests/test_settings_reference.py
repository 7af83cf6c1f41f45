"""docs/configuration.md is what the code says, and says something of every setting that its name does not."""

from __future__ import annotations

from acpo import settings_reference
from acpo.config import Config, RolloutConfig
from acpo.layers import keys


def test_the_reference_is_not_stale():
    assert settings_reference.TARGET.read_text(encoding="utf-8") == settings_reference.text(), "run: python -m acpo.settings_reference"


def test_every_setting_stands_there_once():
    text = settings_reference.text()
    for key in keys(Config):
        assert text.count(f"| `{key}` | ") >= 1 and text.partition("## What `method` sets")[0].count(f"| `{key}` | ") == 1, key


def test_comments_are_the_descriptions():
    said = settings_reference.comments(RolloutConfig)
    assert said["prompts"] == "prompts a step" and said["temperature"] == ""
    text = settings_reference.text()
    assert "A JSON-lines or parquet file; a folder that `datasets` reads" in text, "a comment above its field"
    assert "several names separated by \\|: the first" in text, "a pipe inside a table"

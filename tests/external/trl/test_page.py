"""The lines of docs/integrations/trl.md, as they stand but for the model and the size of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tiny import model_path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "integrations" / "trl.md"


def test_the_lines_of_the_page_train(tmp_path, monkeypatch):
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for old, new in {
        "Qwen/Qwen2.5-0.5B-Instruct": model_path(vocab_size=320),  # as Qwen2, more logits than the tokenizer has entries
        'ACPOConfig("out",': 'ACPOConfig("out", use_cpu=True, bf16=False, report_to=[], max_steps=2, max_completion_length=8,',
    }.items():
        assert lines.count(old) == 1
        lines = lines.replace(old, new)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "solution": f"${2 * i}$"} for i in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(lines, str(PAGE), "exec"), names)
    assert names["trainer"].state.global_step == 2 and "acpo/segments" in names["trainer"].state.log_history[0]

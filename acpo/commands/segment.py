"""`acpo segment`: cuts traces into reasoning steps and says why each ends where it does. No model is read: a tokenizer is enough, and forks (tokens
of high entropy) are not known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import verb

EXAMPLES = """acpo segment traces.jsonl --tokenizer FOLDER                       the steps of every trace, with the reason for each boundary
  acpo segment solution.txt --tokenizer tokenizer.json --json        one JSON object a trace
  cat solution.txt | acpo segment - --tokenizer FOLDER segmenter.max_segments=16"""
MORE = """FILE.jsonl has one JSON object a line with the text under response, trace, completion or solution; any other file is one trace.
"""


def add(verbs) -> None:
    """The sub-parser of the verb."""
    parser = verb(verbs, "segment", "cut traces into reasoning steps, with the reason for each boundary", EXAMPLES, MORE)
    parser.add_argument("file", metavar="FILE", help="traces as JSON lines (.jsonl), a text, or - for standard input")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the segmenter, e.g. segmenter.max_segments=16")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a folder or tokenizer.json of a fast tokenizer, or bytes")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="the first N traces (default: all)")
    parser.add_argument("--width", type=int, default=0, metavar="N", help="columns of the terminal (default: its own; piped: COLUMNS or 120)")
    parser.add_argument("--no-color", action="store_true", help="no colours")
    parser.add_argument("--json", action="store_true", help="print one JSON object a trace")


def run(options) -> int:
    from .. import config
    from ..config import ConfigError
    from ..inspect.data import InspectError
    from ..inspect.terminal import output
    from ..inspect.text import segmented, steps_of, tokenized
    from ..policy import byte_tokenizer, load_tokenizer
    from ..segmentation import segmenter_of

    for name in ("most", "width"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name} must be at least 0, got {getattr(options, name)}")
    others = [word for word in options.words if not word.startswith("segmenter.")]
    if others:
        raise ConfigError(f"wanted settings of the segmenter as segmenter.NAME=VALUE, got {others[0]!r}")
    unread = {"segmenter.fixed", "segmenter.entropy", "segmenter.forking_share"}
    if found := [key for key in (word.partition("=")[0].strip() for word in options.words) if key in unread]:
        raise ConfigError(f"{found[0]} needs a policy or a run: a text alone is cut by its rules")
    # A configuration needs a policy and problems; none of them is read here.
    chosen = config.load(None, options.words, ("FILE", {"policy.from_config": "tiny", "problems.path": options.file})).segmenter
    traces = _traces(options)
    tokenizer = byte_tokenizer() if options.tokenizer == "bytes" else load_tokenizer(options.tokenizer)
    try:
        segmenter = segmenter_of(tokenizer, chosen)
    except ValueError as error:
        raise InspectError(f"--tokenizer: {error}") from None
    texts = [t.response for t in traces]
    packed = tokenized(tokenizer, texts)
    segments, rules = segmented(segmenter, packed)
    steps = steps_of(packed, texts, segments, rules)
    if options.json:
        with output():
            for trace, own in zip(traces, steps, strict=True):
                print(json.dumps(_as_dict(trace, own), ensure_ascii=False))
    else:
        _print(traces, steps, options)
    return 0


def _traces(options) -> list:
    from ..inspect.data import InspectError, clean
    from ..inspect.traces import Trace, read_traces

    if options.file.endswith(".jsonl"):
        return read_traces(options.file, options.most)
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InspectError(f"no such file: {options.file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"cannot read {options.file}: {error}") from None
    return [Trace(Path(options.file).name if options.file != "-" else "standard input", "", clean(text))]


def _as_dict(trace, steps: list) -> dict:
    names = ("start", "end", "tokens", "rule", "answer")
    found = [{**{n: getattr(s, n) for n in names}, "text": trace.response[s.start : s.end]} for s in steps]
    return {"id": trace.id, "tokens": sum(s.tokens for s in steps), "steps": found}


def _print(traces: list, steps: list, options) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..inspect.data import RULES
    from ..inspect.shown import plural, visible
    from ..inspect.terminal import printing

    with printing(options.width, options.no_color) as console:
        for trace, own in zip(traces, steps, strict=True):
            title = f"{visible(trace.id)}  {plural(sum(s.tokens for s in own), 'token')}, {plural(len(own), 'step')}"
            table = Table("", "tokens", "text", "ends with", title=Text(title, "bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
            table.columns[0].justify = table.columns[1].justify = "right"
            table.columns[2].ratio, table.columns[2].overflow, table.columns[3].max_width = 1, "fold", 28
            for k, step in enumerate(own, 1):
                sign, why = RULES[step.rule]
                text = Text(visible(trace.response[step.start : step.end]).rstrip("\n").expandtabs(4), style="bold" if step.answer else "")
                table.add_row(str(k), str(step.tokens), text, Text(f"{sign} {step.rule}: {why}" if step.rule != "end" else f"{sign} end"))
            console.print(table)
            console.print()

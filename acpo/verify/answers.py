"""What a rollout answers, from its text alone, and exact match after a normal form. Everything here takes time linear in the text."""

from __future__ import annotations

import re
from collections import deque

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.)])\.\d+"
# A minus behind a number, a name or a bracket takes away. 3/4 and 1 1/2 are one number; /4, what x is divided by, is found too, and is none.
_FOUND = re.compile(rf"(?:/ ?)?(?:(?<![\w)\]}}])[-\u2212])?(?:\d+ (?=\d+ ?/ ?\d))?(?:{_DIGITS})(?: ?/ ?[-\u2212]?(?:{_DIGITS}))*")
_NUMBER = re.compile(r"([-+]?)((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+)", re.ASCII)
_OPTION = re.compile(r"\(([A-Za-z])\)")  # (B), as a question numbers what it offers
# Behind ####: words, or a LaTeX command that calculates; what makes an expression of a text without words.
_WORD, _COMMAND, _OPERATOR = (
    re.compile(r"[^\W\d_]{2}"),
    re.compile(r"\\(?!text|mathrm|mbox|quad)[A-Za-z]{2}"),
    re.compile(r"[-\u2212+/^<>|:\u00d7\u00b7\d]"),
)
_BRACE = re.compile(r"[{}]")
_BETWEEN = re.compile(r"(?:[\s,;$&]|\\[,;!:() \[\]]|\\q?quad|\\text\{[^{}]*\}|and|or)*")  # what joins the boxes of one answer
_GAP = 60  # characters between two of them, at most


def _box(text: str, limit: int) -> tuple[int, int] | None:
    r"""Where the last \boxed{...} of the first `limit` characters begins and ends; None where it does not close."""
    start, depth = text.rfind("\\boxed{", 0, limit), 0
    for brace in _BRACE.finditer(text, start, limit) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start, brace.end()
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced; None where there is none or it does not close."""
    found = _box(text, len(text))
    return None if found is None else text[found[0] + len("\\boxed{") : found[1] - 1]


def last_boxes(text: str) -> str | None:
    r"""The content of the last \boxed{...}; where others before it are parts of the same answer, all of them: `\boxed{2} \text{ and } \boxed{3}`."""
    found = _box(text, len(text))
    if found is None:
        return None
    start, end = found
    while (before := _box(text, start)) is not None and start - before[1] <= _GAP and _BETWEEN.fullmatch(text, before[1], start):
        start = before[0]
    return text[start:end] if start < found[0] else text[start + len("\\boxed{") : end - 1]


def last_tag(text: str) -> str | None:
    """The content of the last <answer>...</answer>, without the space around it; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def marked_answer(text: str, how: str) -> str | None:
    r"""The answer where the rollout says itself that it is one, None where it does not.

    "line": the last line that begins with A, without the A (the synthetic tasks). "boxed": the last \boxed{}. "tag": the last <answer></answer>.
    "auto": boxed, else the tag, else the rest of the line behind the last ####. "number" and "text" look for no mark.
    """
    if how == "line":
        lines = [line for line in text.split("\n") if line.startswith("A")]
        return lines[-1][1:] if lines else None
    if how == "boxed":
        return last_boxed(text)
    if how == "tag":
        return last_tag(text)
    if how != "auto":
        return None
    for found in (last_boxed(text), last_tag(text)):
        if found is not None:
            return found
    return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip() or None if "####" in text else None


def behind(response: str, after: str) -> str | None:
    """What of a response is read for its answer: all behind the last `after`, where one is wanted; None without it."""
    if not after:
        return response
    return response.rsplit(after, 1)[1] if after in response else None


def extract_answer(text: str, how: str) -> str | None:
    """The answer that exact match compares, None where the rollout gives none: the marked one; for "auto" behind #### its last number where that is
    a number with words and else all of it, and without a mark the last number of the text, for "number" always that, for "text" all of it."""
    if how == "text":
        return text
    found = marked_answer(text, how)
    if how == "number" or (how == "auto" and found is None and "####" not in text):
        return last_number(text)
    if how == "auto" and found is not None and last_boxed(text) is None and last_tag(text) is None:
        return _behind_mark(found)
    return found


def _behind_mark(rest: str) -> str | None:
    """`5 + 3 = 8`, `$8 a day`: 8. `Paris`, `(2,3)`, `x + 1`, `10:30`: all of it. `none` says that there is no answer."""
    numbers = deque(_FOUND.finditer(rest), 1)
    if not numbers:
        return None if rest.strip(" .").lower() == "none" or not any(map(str.isalnum, rest)) else rest
    number = numbers[0]
    others = rest[rest.rfind("=", 0, number.start()) + 1 : number.start()] + " " + rest[number.end() :]
    if number[0][0] == "/" or _COMMAND.search(others) or (_OPERATOR.search(others) and not _WORD.search(others)):
        return rest
    return _plain(number[0])


def last_number(text: str) -> str | None:
    numbers = _FOUND.findall(text)
    return _plain(numbers[-1]) if numbers and numbers[-1][0] != "/" else None


def _plain(number: str) -> str:
    return number.replace("\u2212", "-").replace(" /", "/").replace("/ ", "/")


def normalise(answer: str) -> str:
    r"""The form in which answers are compared: no surrounding space, $ or \$, no full stop, the brackets of an option (B) away; of a number no plus,
    no thousands commas, no decimal zeros, a digit in front of the point, zero without a sign. U+2212 is a minus."""
    text = answer.replace("\\$", "$").replace("\u2212", "-").strip().strip("$").strip()
    if text.endswith("."):
        text = text[:-1]
    if option := _OPTION.fullmatch(text):
        return option[1]
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    sign, digits = number[1], number[2].replace(",", "")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    digits = digits if digits[:1].isdigit() else "0" + digits
    return "-" + digits if sign == "-" and digits.strip("0.") else digits


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal after `normalise`. Digit strings keep their leading zeros."""
    return normalise(answer) == normalise(gold)


def well_formed(text: str, form: str) -> bool:
    r"""The format gate. "think": begins with <think>, opened only once and closed; "boxed": its last \boxed{} closes; "none": anything."""
    if form == "think":
        rest = text.removeprefix("<think>")
        return rest != text and "<think>" not in rest and "</think>" in rest
    return form == "none" or last_boxed(text) is not None

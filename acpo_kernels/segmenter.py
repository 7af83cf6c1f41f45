"""Reasoning steps from token ids: where a rollout may be cut, and the best way to cut it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from ._token_bytes import token_bytes
from .segments import Segments

# A boundary's score is that of the heaviest rule that meets there. Only their order and the places of the
# forks matter much, because the price (below) always lies between two levels. Paragraphs are the steps that people and models
# write; a line break is a step where paragraphs are missing; a list or "Step n" head makes a line break more likely one; a
# discourse marker turns the thought but often inside a sentence group; a sentence end is the finest cut that reads well. A fork
# alone is below all of them (it falls in mid-sentence), and lifts a boundary of the text above its equals; below it is a break
# that its sentence runs over ("lead": a display formula follows). </think> outweighs whatever lies within min_tokens of it.
BOUNDARY_SCORES: Mapping[str, float] = {
    "lead": 0.5, "sentence": 1.0, "marker": 1.5, "line": 2.0, "step": 2.25, "paragraph": 3.0, "think": 8.0, "entropy": 0.75,
}  # fmt: skip

# At the start of a clause only (after punctuation, a line break, a formula or at the start): "Now" as in "Now, let x be", not the
# magazine. Case counts. Chinese ones have no word borders, so words that often stand inside other words are left out.
MARKERS = (
    "Wait", "However", "Therefore", "So", "Alternatively", "Let me", "Let's", "But", "Hmm", "Thus", "Hence", "Now", "First", "Second",
    "Third", "Next", "Then", "Finally", "Actually", "Okay", "Alright", "Maybe", "Similarly", "Consequently", "In conclusion", "To summarize",
    "Double-check", "On the other hand",
    "等等", "等一下", "但是", "然而", "不过", "因此", "所以", "于是", "从而", "另外", "或者", "首先", "其次", "然后", "接下来", "接着", "最后",
    "现在", "综上", "让我", "我们先", "换句话说", "总之",
)  # fmt: skip

# By these a text is known that thinks aloud: its steps are sentences, those of a written solution paragraphs.
ALOUD = (
    "Wait", "wait", "Hmm", "hmm", "Okay", "Alright", "Let me", "let me", "Maybe", "maybe", "Actually", "Perhaps", "perhaps",
    "等等", "等一下", "嗯", "让我", "也许",
)  # fmt: skip

_HEADS = (*(f"Step {d}" for d in range(10)), *(f"STEP {d}" for d in range(10)), *(f"第{d}步" for d in "一二三四五六七八九十"), "步骤")
_ABBREVIATIONS = (
    "e.g.", "i.e.", "cf.", "vs.", "resp.", "approx.", "Mr.", "Mrs.", "Ms.", "Dr.", "Prof.", "St.", "Fig.", "Figs.", "Eq.", "Eqs.", "Sec.",
    "Thm.", "Prop.", "Def.", "Ex.", "Ch.", "Vol.", "pp.",
)  # fmt: skip
_ANSWERS = (
    "answer is", "Answer is", "answer:", "Answer:", "ANSWER:", "answer**:", "Answer**:", "答案",
)  # fmt: skip

# The bits of csrc/automaton.h and the order of its rules.
_MARKER, _HEAD, _ABBREVIATION, _ANSWER, _BOXED, _THINK_OPEN, _THINK_CLOSE, _ALOUD = (1 << i for i in range(8))
_RULES = ("length", "lead", "sentence", "marker", "line", "step", "paragraph", "think", "entropy", "answer", "end", "score")
_MAX_SCORE = 64.0
_MAX_THREADS = 1024  # of very many OpenMP ends the process


class Reading(NamedTuple):
    """What `Segmenter.read` found: scores [N] of the boundaries, answer_start [B] (-1: no answer)."""

    scores: Tensor
    answer_start: Tensor


class Segmenter:
    """Cuts packed sequences of token ids into reasoning steps; a cut is always a token boundary.

    Candidates. After token t there is a semantic score b_t >= 0, found by one automaton over the tokens' bytes that runs across
    token borders: paragraph break 3, list or "Step n" head 2.25, line break 2, discourse marker at t + 1 1.5, sentence end 1
    (abbreviations, decimals, enumerations and initials guarded), break before a display formula 0.5, </think> 8; English and
    Chinese. Where rules meet, the heaviest counts; where a delimiter ends inside a token, the boundary is after that token. None
    lies inside $..$, $$..$$, \\(..\\), \\[..\\] or a ``` fence: a boundary whose token goes on with the opening of one is left out.
    `$..$` must open and close as in pandoc (no space inside, no digit after) and on one line, else it was a price and hides nothing; a
    blank line ends any formula, but \\[ only if no \\] comes. A fence opens at the start of a line (also quoted by >) or
    behind a list mark, unless a backtick follows in its line, and ends at a line that begins with no fewer backticks, or with its quote.
    And there is an entropy score 0.75 where token t + 1 forks: its entropy is above 0, at or above the threshold, and the highest
    within min_tokens on either side (of equal ones the last). Forks count wherever they are, in formulas too.

    Monologues. Who writes a solution down takes a step with a paragraph, who thinks aloud with a sentence. A text thinks aloud
    where at least two words like "Wait", "Hmm" or "let me" (`aloud`) stand in it, and one in at most 32 sentences. Its scores from
    the sentence's on rise by paragraph - sentence (2, to at most 64), and a line break that a sentence runs over (a colon or comma
    before it, or a small letter after it) falls to 0.5.

    Partition. maximise sum(score) - lambda K over all partitions with min_tokens <= n_k <= max_tokens and K <= max_segments;
    exact. Here each b_t > 0 is 2^-10 higher a token of the stretch since the one before (of at most 112), so that cuts spread
    where not all boundaries can be taken. lambda lies halfway below the lowest level of b that pays: the paragraph's where
    boundaries of its level average at most 4 target_tokens, else the highest level that, with all above it, leaves at most
    2 target_tokens a segment, else any. Of equal partitions the one whose last boundary is latest wins, then the one before it.
    max_tokens is raised to the least value with which a partition exists (ceil(T / max_segments) or more). Fewer than min_tokens
    tokens are one segment.

    Answer. The final-answer span is one terminal segment of any length, cut off before the rest is partitioned into at most
    max_segments - 1 (with max_segments 1 there is none). It begins at answer_start, or is detected: the sentence of the last
    \\boxed{, else of the last "answer is", "Answer:" or its Chinese twin, if it begins in the last max_tokens tokens; else what follows
    </think> (of more than max_tokens tokens the part from its best boundary). A text whose <think> is still open has none.

    Shapes
        ids [N], cu_seqlens [B+1], entropy [N], answer_start [B], scores [N].
    Dtypes
        ids, cu_seqlens and answer_start int32 or int64, entropy and scores floating. Scores are used as multiples of 2^-20.
    Units
        entropy in nats (any unit that the threshold shares); entropy[t] is the policy's when it PREDICTS ids[t]. answer_start counts
        tokens from the sequence's first; -1: unknown, detect it.
    Errors
        TypeError for tokens that are no bytes or boundary_scores that are no mapping; ImportError without the compiled extension;
        ValueError for a tokenizer without byte access, bad limits, ids outside [0, vocab_size), offsets that do not start at 0,
        decrease or do not end at N, entropy that is not finite, scores outside [0, 64], answer_start outside its sequence.
    Source
        docs/method.md, segmentation. The bound on K by raising the price: Aggarwal, Schieber, Tokuyama, "Finding a minimum-weight
        k-link path in graphs with the concave Monge property", 1994.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        vocab_size: int | None = None,
        min_tokens: int = 8,
        max_tokens: int = 256,
        max_segments: int = 64,
        target_tokens: int = 64,
        threads: int | None = None,
        markers: Sequence[str] = MARKERS,
        aloud: Sequence[str] = ALOUD,
        boundary_scores: Mapping[str, float] | None = None,
    ):
        """tokens: the bytes of each id, empty for one that is no text; they stay readable as `.tokens`. See `from_tokenizer` for the rest."""
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence) or not all(isinstance(t, bytes) for t in tokens):
            raise TypeError("tokens must be a sequence with the bytes of each id, got something else")
        vocab_size = len(tokens) if vocab_size is None else vocab_size
        _integers(vocab_size=vocab_size, min_tokens=min_tokens, max_tokens=max_tokens, max_segments=max_segments, target_tokens=target_tokens)
        if vocab_size < len(tokens):
            raise ValueError(f"vocab_size must be at least the tokenizer's length {len(tokens)}, got {vocab_size}")
        if max_tokens < min_tokens:
            raise ValueError(f"max_tokens must be at least min_tokens = {min_tokens}, got {max_tokens}")
        if threads is not None:
            _integers(threads=threads)
            if threads > _MAX_THREADS:
                raise ValueError(f"threads must be at most {_MAX_THREADS}, got {threads}")
        if not (boundary_scores is None or isinstance(boundary_scores, Mapping)):
            raise TypeError(f"boundary_scores must be a mapping from rules to scores, got {type(boundary_scores).__name__}")
        weights = dict(BOUNDARY_SCORES)
        for name, value in (boundary_scores or {}).items():
            check.choice("a key of boundary_scores", name, tuple(BOUNDARY_SCORES))
            check.number(f"boundary_scores[{name!r}]", value, low=0, high=_MAX_SCORE)
            weights[name] = float(value)
        self.tokens, self.vocab_size, self.threads = tokens, vocab_size, threads
        self.min_tokens, self.max_tokens, self.max_segments, self.target_tokens = min_tokens, max_tokens, max_segments, target_tokens
        lengths = torch.tensor([len(t) for t in tokens], dtype=torch.int64, device="cpu")
        self._native = _extension().Segmenter(
            b"".join(tokens), lengths.data_ptr(), len(tokens), vocab_size, _patterns(markers, aloud),
            [0.0, *(weights[rule] for rule in _RULES[1:8])], weights["entropy"], min_tokens, max_tokens, max_segments, target_tokens,
        )  # fmt: skip

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer_or_path: Any,
        *,
        vocab_size: int | None = None,
        min_tokens: int = 8,
        max_tokens: int = 256,
        max_segments: int = 64,
        target_tokens: int = 64,
        threads: int | None = None,
        markers: Sequence[str] = MARKERS,
        aloud: Sequence[str] = ALOUD,
        boundary_scores: Mapping[str, float] | None = None,
    ) -> Segmenter:
        """A segmenter for a Hugging Face fast tokenizer: an object (`transformers`, `tokenizers`, anything with
        `backend_tokenizer`), a tokenizer.json, or a folder that holds one.

        vocab_size is the MODEL's (151,936 for Qwen2): its ids beyond the tokenizer are opaque (no text, score 0); the default is
        the tokenizer's length. threads: at most this many, by default torch's. markers replaces the discourse markers, aloud the words
        of thinking aloud, boundary_scores some of `BOUNDARY_SCORES`. ValueError where the tokenizer's tokens have no bytes.
        """
        return cls(
            token_bytes(tokenizer_or_path), vocab_size=vocab_size, min_tokens=min_tokens, max_tokens=max_tokens, max_segments=max_segments,
            target_tokens=target_tokens, threads=threads, markers=markers, aloud=aloud, boundary_scores=boundary_scores,
        )  # fmt: skip

    def read(self, ids: Tensor, cu_seqlens: Tensor) -> Reading:
        """All that the text tells: the score of the boundary after each token, float32 [N], and where each answer begins, int64 [B]
        (-1: nowhere), on the device of ids. Needs no entropy, so it can run beside the forward that gives it; handed to
        `segmenter(..., scores=reading)` the text is not read again. A sequence's reading depends on that sequence alone."""
        host, offsets = self._packed(ids, cu_seqlens)
        scores = torch.empty(host.shape[0], dtype=torch.float32, device="cpu")
        answer_start = torch.empty(offsets.shape[0] - 1, dtype=torch.int64, device="cpu")
        self._native.read(*_batch(host, offsets), self._threads(), scores.data_ptr(), answer_start.data_ptr())
        return Reading(scores.to(ids.device), answer_start.to(ids.device))

    def scores(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The semantic score of the boundary after each token, float32 [N] on the device of ids; an empty batch gives [0]."""
        return self.read(ids, cu_seqlens).scores

    def __call__(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        entropy: Tensor | None = None,
        entropy_threshold: float | None = None,
        answer_start: Tensor | None = None,
        scores: Tensor | Reading | None = None,
    ) -> Segments:
        """The segments of packed ids, on the device of ids.

        entropy_threshold: tokens at or above it may fork; by default the 0.9-quantile inside each sequence. scores: what `read` gave
        for the same ids, and the text is not read again; or scores alone, [N], and where answer_start is -1 or missing the text is
        read for the answer.
        An empty sequence has no segment; results depend on nothing but the sequence itself.
        """
        segments, _ = self._cut(ids, cu_seqlens, entropy, entropy_threshold, answer_start, scores, explain=False)
        return segments

    def explain(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        entropy: Tensor | None = None,
        entropy_threshold: float | None = None,
        answer_start: Tensor | None = None,
        scores: Tensor | Reading | None = None,
    ) -> list[str]:
        """The rule behind the end of each segment of `segmenter(...)`, [S]: paragraph, line, step (a line break before a list or
        "Step n" head), lead (a line break that its sentence runs over), sentence, marker, think (</think>), entropy (a fork alone),
        answer (the terminal segment begins), length (no rule: only the limits), score (only the caller's scores), end (of the
        sequence)."""
        _, rules = self._cut(ids, cu_seqlens, entropy, entropy_threshold, answer_start, scores, explain=True)
        return rules

    def _cut(self, ids, cu_seqlens, entropy, entropy_threshold, answer_start, scores, *, explain: bool) -> tuple[Segments, list[str]]:
        host, offsets = self._packed(ids, cu_seqlens)
        sequences = offsets.shape[0] - 1
        if answer_start is not None:
            answer_start = _answer_start("answer_start", answer_start, offsets)
        detected = isinstance(scores, Reading)
        if detected:
            found = _answer_start("scores.answer_start", scores.answer_start, offsets)
            answer_start = found if answer_start is None else torch.where(answer_start < 0, found, answer_start)
            scores = scores.scores
        for name, values in (("entropy", entropy), ("scores", scores)):
            if values is not None:
                check.tensor(name, values, check.FLOAT, shape=tuple(ids.shape), shape_name="[N]")
        entropy, scores = (None if v is None else v.detach().to("cpu", torch.float32).contiguous() for v in (entropy, scores))
        if entropy_threshold is not None:
            check.number("entropy_threshold", entropy_threshold)
            if entropy is None:
                raise ValueError("entropy_threshold must come with entropy, got none")
            entropy_threshold = float(entropy_threshold)
        address = (0 if t is None else t.data_ptr() for t in (scores, entropy))
        cuts = self._native.cut(
            *_batch(host, offsets), *address, entropy_threshold, 0 if answer_start is None else answer_start.data_ptr(), detected,
            explain, self._threads(),
        )  # fmt: skip
        token_offsets = torch.zeros(cuts.num_segments + 1, dtype=torch.int64, device="cpu")
        sequence_offsets = torch.zeros(sequences + 1, dtype=torch.int64, device="cpu")
        terminal = torch.zeros(sequences, dtype=torch.bool, device="cpu")
        cuts.write(offsets.data_ptr(), token_offsets.data_ptr(), sequence_offsets.data_ptr(), terminal.data_ptr())
        segments = Segments(token_offsets, sequence_offsets, terminal=terminal, num_tokens=host.shape[0])
        return segments.to(ids.device), [_RULES[r] for r in cuts.rules()]

    def _packed(self, ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        check.tensor("ids", ids, check.INTEGER, ndim=1)
        check.tensor("cu_seqlens", cu_seqlens, check.INTEGER, ndim=1)
        offsets = cu_seqlens.to("cpu", torch.int64).contiguous()
        count = ids.shape[0]
        if offsets.shape[0] == 0 or offsets[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {offsets[:1].tolist()}")
        if (offsets.diff() < 0).any():
            at = int((offsets.diff() < 0).nonzero()[0])
            raise ValueError(f"cu_seqlens must not decrease, got {int(offsets[at])} then {int(offsets[at + 1])} at index {at}")
        if offsets[-1] != count:
            raise ValueError(f"cu_seqlens must end at N = {count}, the length of ids, got {int(offsets[-1])}")
        return ids.to("cpu").contiguous(), offsets

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    def __repr__(self) -> str:
        return (
            f"Segmenter(vocab_size={self.vocab_size}, min_tokens={self.min_tokens}, max_tokens={self.max_tokens}, "
            f"max_segments={self.max_segments}, target_tokens={self.target_tokens})"
        )


def _batch(ids: Tensor, offsets: Tensor) -> tuple[int, bool, int, int]:
    return ids.data_ptr(), ids.dtype == torch.int64, offsets.data_ptr(), offsets.shape[0] - 1


def _answer_start(name: str, value: Tensor, offsets: Tensor) -> Tensor:
    check.tensor(name, value, check.INTEGER, shape=(offsets.shape[0] - 1,), shape_name="[B]")
    value = value.to("cpu", torch.int64).contiguous()
    wrong = (value < -1) | ((value >= offsets.diff()) & (value != -1))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        length = int(offsets[at + 1] - offsets[at])
        raise ValueError(f"{name} must be -1 or an index inside its sequence of {length} tokens, got {int(value[at])} at index {at}")
    return value


def _patterns(markers: Sequence[str], aloud: Sequence[str]) -> list[tuple[bytes, int]]:
    for name, texts in (("markers", markers), ("aloud", aloud)):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(t, str) and _is_text(t) for t in texts):
            raise ValueError(f"{name} must be a sequence of strings that are not empty and can be encoded, got {texts!r}")
    kinds = {_MARKER: markers, _HEAD: _HEADS, _ABBREVIATION: _ABBREVIATIONS, _ANSWER: _ANSWERS, _ALOUD: aloud}
    kinds |= {_BOXED: ("\\boxed{",), _THINK_OPEN: ("<think>",), _THINK_CLOSE: ("</think>",)}
    return [(text.encode(), bits) for bits, texts in kinds.items() for text in texts]


def _is_text(text: str) -> bool:
    try:
        return len(text.encode()) > 0
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _integers(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 30:
            raise ValueError(f"{name} must be an integer in [1, 2^30), got {value!r}")


def _extension():
    try:
        from . import _C
    except ImportError as error:
        folder = Path(__file__).parent
        raise ImportError(f"Segmenter needs the compiled extension, and {folder} has none that loads: reinstall without ACPO_NO_EXT=1") from error
    return _C

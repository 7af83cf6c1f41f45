"""The segmenter's tokenizers, and what it refuses."""

# ruff: noqa: RUF001 - Chinese texts are what they say

import pytest
import torch
from segmenter_cases import BYTES, one

from acpo_kernels import Segmenter
from acpo_kernels.segmenter import Reading

# ---- tokenizers


def test_byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["ok", ".", "ĊĊ", "ĠWait", "ä¸Ń", "ãĢ", "Ĥ"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.add_special_tokens(["<|endoftext|>", "</think>"])
    backend.add_tokens(["<tool>\n\n"])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
    for tokenizer in (backend, wrapped):
        segmenter = Segmenter.from_tokenizer(tokenizer)
        assert segmenter.vocab_size == 10
        assert segmenter.scores(*one([0, 1, 3, 1, 2, 0])).tolist() == [0, 1.5, 0, 0, 3, 0]
        assert segmenter.scores(*one([4, 5, 6, 4])).tolist() == [0, 0, 1, 0]  # a character over two tokens
        assert segmenter.scores(*one([0, 1, 7, 0])).tolist() == [0, 0, 0, 0]  # a control token has no text
        assert segmenter.scores(*one([0, 8, 0])).tolist() == [0, 8, 0]  # ... but </think> has
        assert segmenter.scores(*one([0, 9, 0])).tolist() == [0, 3, 0]  # and so have added tokens that are no control tokens
    backend.decoder = None
    assert Segmenter.from_tokenizer(backend).scores(*one([0, 1, 3, 1])).tolist() == [0, 1.5, 0, 0]  # the pre-tokenizer tells as well


def test_sentencepiece_tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    words = ["▁ok", ".", "<0x0A>", "▁Wait", "<0xE3>", "<0x80>", "<0x82>", "中"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    for source in (backend, tmp_path, str(tmp_path / "tokenizer.json")):
        segmenter = Segmenter.from_tokenizer(source)
        assert segmenter.scores(*one([0, 1, 3, 0])).tolist() == [0, 1.5, 0, 0]
        assert segmenter.scores(*one([0, 2, 2, 0])).tolist() == [0, 0, 3, 0]
        assert segmenter.scores(*one([7, 4, 5, 6, 7])).tolist() == [0, 0, 0, 1, 0]
    backend.decoder = decoders.Metaspace()
    assert Segmenter.from_tokenizer(backend).scores(*one([0, 1, 3, 0])).tolist() == [0, 1.5, 0, 0]


def test_wordpiece_wordlevel_and_plain_tokenizers():
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(["ok", "##.", "Wait", "W", "##ait"])}, unk_token="ok"))
    backend.decoder = decoders.WordPiece()
    segmenter = Segmenter.from_tokenizer(backend)
    assert segmenter.scores(*one([0, 1, 2, 0])).tolist() == [0, 1.5, 0, 0]
    assert segmenter.scores(*one([0, 1, 3, 4, 0])).tolist() == [0, 1.5, 0, 0, 0]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["1", "+", "=", "2", "\n", "A"])}, unk_token="A"))
    assert Segmenter.from_tokenizer(plain).scores(*one([0, 1, 0, 2, 3, 4, 5, 3])).tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    suffixed = Tokenizer(models.BPE({"ok</w>": 0, ".</w>": 1, "So</w>": 2}, []))
    suffixed.decoder = decoders.BPEDecoder("</w>")
    assert Segmenter.from_tokenizer(suffixed).scores(*one([0, 1, 2, 0])).tolist() == [0, 1.5, 0, 0]


# ---- bad input


def test_a_default_device_is_not_the_segmenters():
    """What C++ writes into lies in the host's memory, whatever torch would make by default."""
    tokens = [b"ok", b". ", b"Wait"]
    wanted = Segmenter(tokens, min_tokens=1)
    ids, cu = one([0, 1, 2, 0])
    with torch.device("meta"):
        segmenter = Segmenter(tokens, min_tokens=1)
        scores, starts = segmenter.read(ids, cu)
        offsets = segmenter(ids, cu).token_offsets
    assert torch.equal(scores, wanted.scores(ids, cu)) and starts.tolist() == [-1] and torch.equal(offsets, wanted(ids, cu).token_offsets)


def test_bad_tokenizers(tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models

    with pytest.raises(ValueError, match=r"tokenizer must be a fast tokenizer .* got object, which has no backend_tokenizer"):
        Segmenter.from_tokenizer(object())
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer\.json or a folder .* got 'no/such'"):
        Segmenter.from_tokenizer("no/such")
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer\.json or a folder"):
        Segmenter.from_tokenizer(tmp_path)
    backend = Tokenizer(models.BPE({"中": 0}, []))
    backend.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="decoder of type CTC"):
        Segmenter.from_tokenizer(backend)
    backend.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"got a decoder that replaces by the pattern '▁\+'"):
        Segmenter.from_tokenizer(backend)
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="the character '中', which is no byte"):
        Segmenter.from_tokenizer(backend)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 3}, "vocab_size must be at least the tokenizer's length 256, got 3"),
        ({"min_tokens": 0}, r"min_tokens must be an integer in \[1, 2\^30\), got 0"),
        ({"max_tokens": 7}, "max_tokens must be at least min_tokens = 8, got 7"),
        ({"max_segments": 2.5}, "max_segments must be an integer"),
        ({"target_tokens": -1}, "target_tokens must be an integer"),
        ({"threads": 0}, "threads must be an integer"),
        ({"markers": "Wait"}, "markers must be a sequence of strings"),
        ({"markers": ("",)}, "markers must be a sequence of strings that are not empty"),
        ({"aloud": "Hmm"}, "aloud must be a sequence of strings"),
        ({"boundary_scores": {"lines": 1}}, "a key of boundary_scores must be one of 'lead', .*, got 'lines'"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"threads": 100_000}, "threads must be at most 1024, got 100000"),
        ({"boundary_scores": {"line": 100}}, r"boundary_scores\['line'\] must be at most 64"),
    ],
)
def test_bad_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(BYTES, **arguments)


IDS, CU = torch.arange(6), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": IDS - 1}, r"ids must lie in \[0, vocab_size\) with vocab_size = 256, got -1 at index 0"),
        ({"ids": IDS.int() + 251}, "got 256 at index 5"),
        ({"ids": IDS.float()}, "ids must have dtype int64, int32"),
        ({"ids": IDS.view(2, 3)}, "ids must have 1 dimension"),
        ({"cu_seqlens": CU.float()}, "cu_seqlens must have dtype"),
        ({"cu_seqlens": CU[:0]}, "cu_seqlens must start at 0"),
        ({"cu_seqlens": CU + 1}, r"cu_seqlens must start at 0, got \[1\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens must not decrease, got 4 then 2 at index 1"),
        ({"cu_seqlens": torch.tensor([0, -1, 6])}, "cu_seqlens must not decrease, got 0 then -1"),
        ({"cu_seqlens": CU[:2]}, "cu_seqlens must end at N = 6, the length of ids, got 2"),
        ({"entropy": torch.zeros(5)}, r"entropy must have shape \[N\]"),
        ({"entropy": torch.tensor([0, 0, 0, float("nan"), 0, 0])}, "entropy must be finite, got nan at index 3"),
        ({"entropy": torch.full((6,), torch.inf)}, "entropy must be finite, got inf at index 0"),
        ({"entropy": torch.zeros(6), "entropy_threshold": float("nan")}, "entropy_threshold must be finite"),
        ({"entropy_threshold": 1.0}, "entropy_threshold must come with entropy"),
        ({"scores": torch.full((6,), -1.0)}, r"scores must be in \[0, 64\], got -1"),
        ({"scores": torch.full((6,), float("nan"))}, r"scores must be in \[0, 64\], got nan"),
        ({"scores": Reading(torch.zeros(6), torch.zeros(3, dtype=torch.int64))}, r"scores\.answer_start must have shape \[B\]"),
        ({"scores": Reading(torch.zeros(6), torch.tensor([0, 4]))}, "inside its sequence of 4 tokens, got 4 at index 1"),
        ({"answer_start": torch.tensor([0])}, r"answer_start must have shape \[B\]"),
        ({"answer_start": torch.tensor([2, 0])}, "inside its sequence of 2 tokens, got 2 at index 0"),
        ({"answer_start": torch.tensor([0, -2])}, "inside its sequence of 4 tokens, got -2 at index 1"),
    ],
)
def test_bad_batches(changes, message):
    arguments = {"ids": IDS, "cu_seqlens": CU} | changes
    with pytest.raises(ValueError, match=message):
        Segmenter(BYTES)(**arguments)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"ids must be a torch\.Tensor, got list"):
        Segmenter(BYTES)([1, 2], CU)

"""Operations for step-level credit assignment: one contract each, on CPU and CUDA. README.md, "Which kernels", says what runs where."""

from ._results import HindsightInformation, LinearPolicyLoss, LogprobEntropy, PolicyLoss, SegmentCredit
from .hindsight_information import hindsight_information
from .linear_hindsight_information import linear_hindsight_information
from .linear_logprob_entropy import linear_logprob_entropy
from .linear_policy_loss import linear_policy_loss
from .logprob_entropy import logprob_entropy
from .policy_loss import policy_loss
from .segment_credit import segment_credit
from .segment_reduce import segment_reduce
from .segmenter import Segmenter
from .segments import Segments, pack, unpack

__all__ = [
    "HindsightInformation", "LinearPolicyLoss", "LogprobEntropy", "PolicyLoss", "SegmentCredit", "Segmenter", "Segments",
    "hindsight_information", "linear_hindsight_information", "linear_logprob_entropy", "linear_policy_loss", "logprob_entropy", "pack",
    "policy_loss", "segment_credit", "segment_reduce", "unpack",
]  # fmt: skip

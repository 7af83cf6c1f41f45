"""The policy: a transformers causal language model whose forward takes rollouts and returns the loss, the head inside."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acpo_kernels import (
    HindsightInformation,
    LinearPolicyLoss,
    LogprobEntropy,
    Segments,
    linear_hindsight_information,
    linear_logprob_entropy,
    linear_policy_loss,
    pack,
)

from . import adapters, packing
from .config import Config, ConfigError, PolicyConfig
from .probe import Packed

# Of config: what some models multiply their logits by (the last one divides the hidden states), and caps that others put on them under a name of
# their own. Sampling goes through the model's own forward and does the same; the head's operations would train another distribution.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier")
CAPS = ("logits_soft_cap", "output_logit_soft_cap")


def logits_changed(model: nn.Module) -> str:
    """What the model does to its logits behind the head that the head's operations do not know, or the empty string."""
    config = model.config.get_text_config()
    for names, neutral, does in ((SCALES, (None, 1), "multiplies"), (CAPS, (None,), "caps")):
        for name in names:
            if getattr(config, name, None) not in neutral:
                return f"its config {does} the logits ({name} = {getattr(config, name)})"
    return ""


class Policy(nn.Module):
    """One module from prompts and responses to log-probs or a loss, so that DDP and FSDP see every parameter.

    Rollouts go through the body right-padded: under causal attention no real token sees the padding, so no mask is needed, and the
    padding is dropped before the head. packed=True: one behind the other without padding (packing.py).
    """

    def __init__(self, model: nn.Module, pad_id: int, dtype: torch.dtype = torch.float32, packed: bool = False):
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.dtype = dtype
        self.packed = packed
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or "float8" in str(head.weight.dtype):
            raise ConfigError(f"policy: the head must be a plain linear layer (no LoRA, no fp8), got {type(head).__name__}")
        if why := logits_changed(model):
            raise ConfigError(f"policy: {type(model).__name__} cannot be trained: {why}")
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.version = 0  # counts what changed the weights, so that a rollout engine knows when its own are old

    def changed(self) -> None:
        """Somebody changed the weights."""
        self.version += 1

    def load_state_dict(self, *arguments, **settings):
        self.changed()
        return super().load_state_dict(*arguments, **settings)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that training changes: of a policy with adapters these alone."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def frozen_copy(self) -> Policy:
        """The policy as it is now; what training leaves alone is not held twice."""
        frozen = {id(value): value for value in self.parameters() if not value.requires_grad}
        return copy.deepcopy(self, frozen).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def head(self) -> dict[str, Tensor | float | None]:
        head = self.model.get_output_embeddings()
        return {"weight": head.weight, "bias": head.bias, "softcap": self.softcap}

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the model as a checkpoint on disk names them, adapters merged, one at a time; a tied head is its embedding."""
        from transformers.core_model_loading import revert_weight_conversion

        for name, value in adapters.merged(self.model):
            yield from revert_weight_conversion(self.model, {name: value.detach()}).items()

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The model as a folder that transformers reads, adapters merged. weights: where it does not hold them whole itself."""
        if adapters.layers(self.model):
            weights = dict(adapters.merged(self.model))
        self.model.save_pretrained(folder, state_dict=weights)

    def save_shape(self, folder: Path) -> Path:
        """The model's configuration, without weights, as a folder that vLLM builds it from."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        return folder

    @property
    def positions(self) -> int | None:
        """How many tokens it reads at most; None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def precision(self) -> torch.autocast:
        """The context that the policy computes in. Weights stay float32: a step of 1e-6 is lost in the eight bits of a bfloat16 weight."""
        return torch.autocast(self.device.type, dtype=self.dtype if self.dtype != torch.float32 else None, enabled=self.dtype != torch.float32)

    def hidden(self, prompts: list[list[int]], responses: list[Tensor]) -> Tensor:
        """The hidden states [N,H] that predict the response tokens."""
        lengths = [len(p) for p in prompts]
        given = torch.tensor([*itertools.chain.from_iterable(prompts)], device=responses[0].device, dtype=responses[0].dtype).split(lengths)
        rows = [torch.cat(both) for both in zip(given, responses, strict=True)]
        if self.packed:
            with self.precision():
                return packing.hidden_states(self.model, rows, lengths)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id).to(self.device)
        start = torch.tensor(lengths, device=self.device).unsqueeze(1) - 1
        end = start + torch.tensor([len(r) for r in responses], device=self.device).unsqueeze(1)
        at = torch.arange(ids.shape[1], device=self.device)
        with self.precision():
            return pack(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state, (at >= start) & (at < end))

    @torch.no_grad()
    def branch_logp(self, packed: list[Packed], ids: list[Tensor], temperature: float) -> list[Tensor]:
        """Log-prob of each branch's answer, the sum over its tokens, one [branches] a rollout; ids are the answer tokens that the rows predict."""
        longest = max(len(p.ids) for p in packed)
        tokens = torch.full((len(packed), longest), self.pad_id)
        positions = torch.zeros(len(packed), longest, dtype=torch.int64)
        visible = torch.eye(longest, dtype=torch.bool).repeat(len(packed), 1, 1)  # padding sees itself, so that its row is finite
        for b, p in enumerate(packed):
            n = len(p.ids)
            tokens[b, :n], positions[b, :n], visible[b, :n, :n] = p.ids, p.positions, p.visible
        mask = torch.zeros(visible.shape, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min).unsqueeze(1).to(self.device)
        with self.precision():
            out = self.model.base_model(
                input_ids=tokens.to(self.device), position_ids=positions.to(self.device), attention_mask=mask, use_cache=False
            ).last_hidden_state
        hidden = torch.cat([out[b, p.rows.to(self.device)] for b, p in enumerate(packed)])
        logp = self.score(hidden, torch.cat(ids).to(self.device), temperature).logp.split([len(p.rows) for p in packed])
        return [part.new_zeros(p.branches).index_add(0, p.branch.to(part.device), part) for p, part in zip(packed, logp, strict=True)]

    def score(self, hidden: Tensor, ids: Tensor, temperature: float) -> LogprobEntropy:
        """Log-probs and entropies of tokens from the hidden states that predict them."""
        with self.precision():
            return linear_logprob_entropy(hidden, ids=ids, temperature=temperature, **self.head())

    def hindsight(self, hidden: Tensor, hinted: Tensor, ids: Tensor, temperature: float) -> HindsightInformation:
        """What tokens share with the answer, from the hidden states without and with it in the prompt."""
        with self.precision():
            return linear_hindsight_information(hidden, hinted, ids=ids, temperature=temperature, **self.head())

    def forward(
        self, prompts: list[list[int]], responses: list[Tensor], old_logp: Tensor | None, advantages: Tensor, segments: Segments, **settings
    ) -> LinearPolicyLoss:
        """`linear_policy_loss` of the responses; settings are its keywords."""
        hidden, ids = self.hidden(prompts, responses), torch.cat(responses)
        with self.precision():
            return linear_policy_loss(hidden, ids=ids, old_logp=old_logp, advantages=advantages, segments=segments, **self.head(), **settings)


# Sizes of randomly initialised Qwen2 policies: hidden, intermediate, layers, heads.
SIZES = {"tiny": (64, 128, 2, 2), "small": (96, 288, 2, 4), "medium": (512, 1408, 6, 8)}  # 0.1, 0.25 and 19 million parameters


def build(config: Config, writes: bool = True) -> tuple[Policy, Any]:
    """The policy and its tokenizer. Weights of a `from_config` policy are drawn from torch's global generator (the run's seed). writes=False: it
    only reads, so that its tokenizer need not say what ends a rollout or pads one."""
    settings = config.policy
    if settings.path and not Path(settings.path).is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", settings.path)  # what a run starts from lies on the disk, where it stays what it is
        way = f"; if it is a model of the hub: hf download {settings.path} --local-dir FOLDER, and policy.path=FOLDER" if hub else ""
        raise ConfigError(f"policy.path: no such folder: {settings.path}{way}")
    tokenizer = _tokenizer(config, writes)
    device = _device(settings.device)
    model = _pretrained(settings) if settings.path else _from_config(settings, tokenizer)
    if settings.path and device.type == "cpu":
        _own_memory(model)
    _training_without_dropout(model)
    _generation_that_can_be_saved(model)
    if settings.lora_rank:
        adapters.add(model, settings)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.get_output_embeddings().weight.shape[0] < len(tokenizer):
        raise ConfigError(
            f"policy: the tokenizer has {len(tokenizer)} entries and the model only {model.get_output_embeddings().weight.shape[0]} logits"
        )
    packed = settings.packing == "packed" or (settings.packing == "auto" and settings.attention == "flash_attention_2")
    policy = Policy(model.to(device), tokenizer.pad_token_id or 0, getattr(torch, settings.dtype), packed)
    if packed:
        packing.check(policy.model, policy.precision())
    return policy, tokenizer


def _training_without_dropout(model: nn.Module) -> None:
    """Layers are checkpointed in training mode alone; but a policy that drops out at random is not the one that sampled. Models pass their rates
    to functions, from attributes of many names or from the config itself; a layer can be dropped whole (layerdrop)."""
    model.train()
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for holder in (*modules, *(module.config for module in modules if hasattr(module, "config"))):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop") or name == "layerdrop"):
                setattr(holder, name, 0.0)


def _generation_that_can_be_saved(model: Any) -> None:
    """transformers reads a generation_config.json that contradicts itself with a warning and refuses to write it: at the end of a run. Of such a one
    only the special tokens are kept."""
    found = getattr(model, "generation_config", None)
    if found is None:
        return
    try:
        found.validate(strict=True)
    except ValueError:
        ids = {name: getattr(found, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if isinstance(ids["pad_token_id"], int) and ids["pad_token_id"] < 0:
            del ids["pad_token_id"]
        model.generation_config = type(found)(**ids)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ConfigError(f"policy.device: {name!r} cannot be used: wanted auto, cpu or cuda")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's own words differ by build
        raise ConfigError(f"policy.device: {name!r} cannot be used: {' '.join(str(error).split())}") from None


# A folder with weights is data: no Python file of it is run (left open, transformers asks at the terminal), nothing of it is unpickled.
UNTRUSTED = {"trust_remote_code": False, "use_safetensors": True}


def _pretrained(settings: PolicyConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, attn_implementation=settings.attention, local_files_only=True, **UNTRUSTED
        )
    except ImportError as error:
        raise _attention_missing(settings, error) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.path: cannot load {settings.path}: {' '.join(str(error).split())}") from None


def _own_memory(model: nn.Module) -> None:
    """Weights that are their file, mapped, lie where its header ends: off every cache line, so that products read lines twice (a decoded token
    takes 1.4 times as long). And a file that is cut short would end a run that maps it."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()


def _attention_missing(settings: PolicyConfig, error: ImportError) -> ConfigError:
    why = " ".join(str(error).split())
    return ConfigError(f"policy.attention = {settings.attention!r}: {why}; pip install --no-build-isolation -e '.[flash-attn]'")


def _from_config(settings: PolicyConfig, tokenizer) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, layers, heads = SIZES[settings.from_config]
    # Qwen2 pads its 151,646 tokenizer entries to 151,936 logits, a multiple of 128 and more; a character vocabulary stays as it is.
    size = len(tokenizer)
    vocab = size if size < 1024 else 151_936 if 151_000 < size <= 151_936 else -(-size // 128) * 128
    shape = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=32768, tie_word_embeddings=True, attn_implementation=settings.attention,
        initializer_range=0.6 / hidden**0.5,  # Qwen2's 0.02 suits a width of 1,000: this narrow, it doubles the steps of a warm-up
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    try:
        return Qwen2ForCausalLM(shape)
    except ImportError as error:
        raise _attention_missing(settings, error) from None


def _tokenizer(config: Config, writes: bool):
    """The tokenizer of policy.tokenizer, of policy.path, or the characters of the synthetic task; to write it must have pad and eos."""
    from .synthetic import merged
    from .synthetic import tokenizer as characters

    source = config.policy.tokenizer or config.policy.path
    if not source:
        if not config.problems.task:
            raise ConfigError("policy.tokenizer must name a tokenizer folder or tokenizer.json, or be 'bytes', with policy.from_config, got ''")
        tokenizer = characters()
    else:
        tokenizer = byte_tokenizer() if source == "bytes" else load_tokenizer(source)
        if config.problems.task and (text := merged(tokenizer)):
            setting = "policy.tokenizer" if config.policy.tokenizer else "policy.path (policy.tokenizer is empty)"
            raise ConfigError(
                f"problems.task = {config.problems.task!r} needs a tokenizer with one token for each of its characters, and that of {setting}, "
                f"{source}, has not: {text!r}; 'bytes' has, and so has the built-in one with policy.from_config and policy.tokenizer = ''"
            )
    if writes and tokenizer.eos_token_id is None:
        raise ConfigError(f"policy.tokenizer: {source} has no eos token: a rollout could not end")
    if writes and tokenizer.pad_token_id is None:
        raise ConfigError(f"policy.tokenizer: {source} has no pad token: set pad_token in its tokenizer_config.json (its eos token will do)")
    if config.problems.chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("problems.chat = true needs a tokenizer with a chat template; set it to false, or give another policy.tokenizer")
    return tokenizer


def byte_tokenizer():
    """One token a byte, <pad> and <eos>: any text, nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)


def load_tokenizer(source: str):
    """A fast tokenizer from a folder or a tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    if not path.exists():
        raise ConfigError(f"policy.tokenizer: no such file or folder: {source}")
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if _generic(path):  # beside a model's config.json AutoTokenizer would take the model family's class, with another pre-tokenizer
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise ConfigError(f"policy.tokenizer: cannot load {source}: {' '.join(str(error).split())}") from None


def _generic(folder: Path) -> bool:
    """Whether a tokenizer folder says that its tokenizer.json is all there is to it."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "tokenizer.json").exists() and settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def eos_ids(policy: Policy, tokenizer) -> list[int]:
    """The tokens that end a rollout: the tokenizer's and those of the model's generation config."""
    config = getattr(policy.model, "generation_config", None)
    more = getattr(config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])})

"""Files that nobody should write: configurations, problems, tokenizers, checkpoints, metrics. What is read is right, or one error names the file or
the key; nothing else comes out, and nothing is executed. `make fuzz` draws ACPO_EXAMPLES of each, other ones each time."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from acpo import checkpoint, config, problems, report
from acpo.checkpoint import CheckpointError
from acpo.config import Config, ConfigError
from acpo.layers import keys
from acpo.problems import Problem, ProblemError
from acpo.run import Run
from acpo_kernels import Segmenter

EXAMPLES = int(os.environ.get("ACPO_EXAMPLES", "0"))
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining traces every line
many = settings(max_examples=EXAMPLES, derandomize=False, phases=PHASES) if EXAMPLES else settings(max_examples=20, phases=PHASES)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates(),
    st.sampled_from(["1e-3", "nan", ".inf", "hindsight,tree", "acpo", "{problem}", "os:system", "x:y", "auto", 10**400, -1, 0, 2**63]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6)
BASE = {"problems.task": "chain", "policy.from_config": "tiny"}
SETTINGS = sorted(keys(Config))


def nested(flat: dict) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return tree


@many
@given(st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=3), st.lists(st.text(max_size=20), max_size=2))
def test_settings_of_any_value(changed, overrides):
    """Through a YAML file and through key=value."""
    try:
        found = config.from_layers(("file", {**BASE, **changed}), ("the command line", dict(map(config._override, overrides))))
        assert isinstance(found, Config)
        assert config.from_layers(("again", config.flatten(config.to_dict(found)))) == found, "what was accepted is accepted again"
    except ConfigError as error:
        sections = ("method", "override", "unknown setting", "problems.", "policy.", "credit.", "loss.", "verify.")
        assert any(part in str(error) for part in (*changed, *sections, *(key.rpartition(".")[0] + "." for key in changed if "." in key))), error


@many
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")), VALUES.map(lambda v: yaml.dump(v).encode()))
)
def test_any_bytes_as_a_configuration(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    try:
        config.load(path, ["problems.task=chain", "policy.from_config=tiny"])
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    ["a: !!python/object/apply:os.system ['touch HIT']", "!!python/object/new:subprocess.Popen [['touch', 'HIT']]", "a: &a [*a]", "a: &a {b: *a}",
     "a: &x [1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x]\nc: [*y,*y,*y,*y,*y,*y,*y,*y]", "[" * 3000, "{a: " * 3000, "? " * 500],
)  # fmt: skip
def test_yaml_that_wants_more_than_to_be_read(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        config.load(tmp_path / "c.yaml")
    assert not (tmp_path / "HIT").exists()


GOOD = json.dumps({"problem": "1 + 1?", "answer": "2"})
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5)


@many
@given(st.lists(st.one_of(
    st.just(GOOD.encode()), st.binary(max_size=40), JSON.map(lambda v: json.dumps(v).encode()),
    st.fixed_dictionaries({"problem": JSON, "answer": JSON}).map(lambda v: json.dumps(v).encode()),
    st.sampled_from([b"[" * 100_000, b'{"problem": ' * 5000, GOOD.encode()[:-4], b"\xef\xbb\xbf" + GOOD.encode(), b"1" * 5000]),
), max_size=4))  # fmt: skip
def test_any_lines_as_problems(tmp_path, lines):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found = problems.load(path)
        assert found and all(isinstance(p, Problem) and p.prompt.strip() and p.answer.strip() for p in found)
    except ProblemError as error:
        assert str(path) in str(error) and len(str(error)) < 2000


def test_a_row_of_very_many_fields_or_of_one_long_name_is_named_in_short(tmp_path):
    path = tmp_path / "p.jsonl"
    for row in ({f"x{i}": 1 for i in range(100_000)}, {"y" * 10_000_000: 1}):
        path.write_text(json.dumps(row))
        with pytest.raises(ProblemError, match="wanted a non-empty field 'problem', got the fields") as caught:
            problems.load(path)
        assert len(str(caught.value)) < 1000


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> bytes:
    from acpo.policy import byte_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return (folder / "tokenizer.json").read_bytes()


@many
@given(st.data())
def test_damaged_tokenizers(tmp_path, tokenizer_file, data):
    path = tmp_path / "tokenizer.json"
    draw = data.draw
    how = draw(st.sampled_from(["bytes", "cut", "flip", "entry"]))
    content = bytearray(tokenizer_file)
    if how == "bytes":
        content = draw(st.binary(max_size=100))
    elif how == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif how == "flip":
        for _ in range(draw(st.integers(1, 4))):
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    else:
        tree = json.loads(bytes(content))
        part = draw(st.sampled_from(["model", "decoder", "pre_tokenizer", "added_tokens", "normalizer", "post_processor"]))
        tree[part] = draw(JSON)
        content = json.dumps(tree).encode()
    path.write_bytes(bytes(content))
    try:
        made = Segmenter.from_tokenizer(path)
        ids = torch.arange(min(made.vocab_size, 50))
        assert made(ids, torch.tensor([0, len(ids)])).num_tokens == len(ids)
    except (ValueError, TypeError) as error:
        assert "tokenizer" in str(error) or "vocab_size" in str(error), error


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    tensors = {"policy": {"w": torch.randn(3, 4), "b": torch.zeros(0)}, "random": {"torch": torch.arange(9, dtype=torch.uint8)}}
    path = checkpoint.save(tmp_path_factory.mktemp("whole"), "step-1", tensors, {"files": sorted(tensors), "step": 1}, 1)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@many
@given(st.data())
def test_damaged_checkpoints(tmp_path, whole, capsys, data):
    """Any damage is found by the checksums; damage that somebody sealed again, by what reads it. The one before is used."""
    draw = data.draw
    folder = tmp_path / "step-2"
    folder.mkdir(exist_ok=True)
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    name = draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    how = draw(st.sampled_from(["flip", "cut", "more", "bytes"]))
    if how == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif how == "more":
        content += draw(st.binary(min_size=1, max_size=9))
    else:
        content = draw(st.binary(max_size=60)) + b"\0"
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*step-2"):
        checkpoint.read(folder)
    checkpoint.seal(folder)
    try:
        tensors, state = checkpoint.read(folder)
        assert isinstance(state, dict) and all(isinstance(t, torch.Tensor) for part in tensors.values() for t in part.values())
    except CheckpointError as error:
        assert "step-2" in str(error)
        state = json.loads(whole["state.json"])  # the one before it, below
    first = tmp_path / "step-1"
    first.mkdir(exist_ok=True)
    for other, content in whole.items():
        (first / other).write_bytes(content)
    assert checkpoint.latest(tmp_path)[1] == state
    capsys.readouterr()


@many
@given(st.lists(st.one_of(st.binary(max_size=30), JSON.map(lambda v: json.dumps(v).encode()),
                          st.integers(0, 9).map(lambda i: json.dumps({"phase": "stage1", "step": i}).encode())), max_size=5))  # fmt: skip
def test_any_lines_as_metrics(tmp_path, lines):
    """A run goes on with the records that are some."""
    run = Run(config.from_layers(("test", {**BASE, "run_dir": str(tmp_path)})))
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "config.yaml").write_bytes(b"\n".join(lines))
    try:
        report.load([tmp_path])
    except report.ReportError as error:
        assert str(tmp_path) in str(error) and len(str(error)) < 1000
    run.cut_back(0, 5)
    assert all(r["step"] <= 5 for r in run.records())

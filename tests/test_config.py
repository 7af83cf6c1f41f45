"""Configuration: layers, the shorthand `method`, and one clear error for every setting that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from acpo import config, layers, limits
from acpo.config import METHODS, Config, ConfigError, load, value_of

BASE = "problems.task=chain", "policy.from_config=tiny"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def from_file(tmp_path: Path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, [*BASE, *overrides])


def test_layers(tmp_path):
    plain = load(None, BASE)
    assert (plain.rollout.group_size, plain.rollout.prompts, plain.name) == (8, 12, "run")
    chosen = from_file(tmp_path, "rollout: {group_size: 4, prompts: 6}", "rollout.prompts=3")
    assert (chosen.rollout.group_size, chosen.rollout.prompts, chosen.name) == (4, 3, "some")
    assert load(None, BASE) == plain, "a configuration must not leak into the defaults of the next"


def test_a_run_has_its_files_name_where_nothing_else_is_given(tmp_path):
    assert from_file(tmp_path, "").name == "some"
    for text, words in (("name: run", ()), ("", ("name=run",)), ("name: other", ("name=run",))):
        assert from_file(tmp_path, text, *words).name == "run", "also where it is the default's"


def test_dotted_and_nested_keys_of_a_file_are_the_same(tmp_path):
    assert from_file(tmp_path, "trainer.steps: 7") == from_file(tmp_path, "trainer: {steps: 7}")


def test_numbers_as_people_write_them(tmp_path):
    chosen = from_file(tmp_path, "optimizer: {learning_rate: 2e-4}\nentropy: {weight: 1}", "warmup.learning_rate=1e-3", "loss.clip_low=0")
    assert (chosen.optimizer.learning_rate, chosen.warmup.learning_rate) == (2e-4, 1e-3)
    assert chosen.entropy.weight == 1.0 and isinstance(chosen.entropy.weight, float)
    assert chosen.loss.clip_low == 0.0 and isinstance(chosen.loss.clip_low, float)


@pytest.mark.parametrize("text", ["010", "1e3", "12", "true", "a: b", "[x", "#1", "~"])
def test_text_settings_keep_the_text_of_the_command_line(text):
    chosen = load(None, [*BASE, f"run_dir={text}"])
    assert chosen.run_dir == text and str(chosen.directory) == text


def test_numbers_of_the_command_line_are_what_was_typed():
    chosen = load(None, [*BASE, "seed=0", "trainer.steps=1_000", "credit.gain=0.5", "optimizer.max_grad_norm=07.5"])
    assert (chosen.seed, chosen.trainer.steps, chosen.credit.gain, chosen.optimizer.max_grad_norm) == (0, 1000, 0.5, 7.5)


def test_what_other_trainers_call_it_is_a_setting_here_and_by_that_name_alone():
    known = layers.keys(Config)
    assert set(layers.CALLED.values()) <= set(known) and not set(layers.CALLED) & set(known)


def test_quoted_text_on_the_command_line_is_yaml():
    assert load(None, [*BASE, r'attribution.probe_suffix="\nQ:\t"']).attribution.probe_suffix == "\nQ:\t"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_sise=4", "the command line: unknown setting 'rollout.group_sise'; the nearest is 'rollout.group_size'"),
        ("lerning_rate=1e-3", r"unknown setting 'lerning_rate'; the nearest is '\w+\.learning_rate'"),
        ("learning_rate=1e-3", r"the nearest is 'warmup\.learning_rate' or 'optimizer\.learning_rate'$"),
        ("trainer.group_size=4", r"unknown setting 'trainer\.group_size'; the nearest is 'rollout\.group_size'$"),
        ("rolout.num_generations=4", r"unknown setting 'rolout\.num_generations'; here it is 'rollout\.group_size'$"),
        ("zzz.qqq=4", r"unknown setting 'zzz\.qqq'; docs/configuration\.md lists all of them$"),
        ("rollout=4", "the command line: 'rollout' is a section and must hold a mapping of its settings$"),
        ("trainer.steps=many", "trainer.steps must be an int, got 'many'"),
        ("trainer.steps=1.5", "trainer.steps must be an int, got 1.5"),
        ("trainer.steps=true", "trainer.steps must be an int, got True"),
        ("trainer.steps=", "trainer.steps must be an int, got ''"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a float, got 'fast'"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate must be a float, got True"),
        ("entropy.gated=1", "entropy.gated must be a bool, got 1"),
        (
            "credit.form=additiv",
            "credit.form must be one of 'additive', 'weights', 'branch', 'ratio', 'none', got 'additiv'; did you mean 'additive'?",
        ),
        ("method=grp", "method must be one of .* did you mean 'grpo'?"),
        ("trainer.steps", "an override must be key=value, got 'trainer.steps'"),
        ("=3", "an override must be key=value, got '=3'"),
        *((f"seed={n}", f"the command line: seed must be written in decimal digits, got '{n}'") for n in ("010", "-010", "1:30", "1:30.5")),
        ("trainer.steps=1:30", "trainer.steps must be written in decimal digits, got '1:30'"),
        ("credit.gain=010", "credit.gain must be written in decimal digits, got '010'"),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [*BASE, override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attribution:", r"some.yaml: 'attribution' is a section and must hold a mapping of its settings$"),
        ("rollout: {vllm: }", r"some.yaml: 'rollout\.vllm' is a section and must hold"),
        ("trainer: {stepz: 3}", r"some.yaml: unknown setting 'trainer.stepz'; the nearest is 'trainer.steps'"),
        ("trainer: {steps: [3]}", r"some.yaml: trainer.steps must be an int, got \[3\]"),
        ("- 1\n- 2", "some.yaml must hold a mapping of settings, got list"),
        ("a: [1", "some.yaml is not valid YAML"),
        ("a: b: c", "some.yaml is not valid YAML"),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_file(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_empty_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "latin.yaml")
    assert from_file(tmp_path, "") == from_file(tmp_path, "# nothing but this line\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *((f"{key}=0", f"{key} must be greater than 0, got 0") for key in limits.POSITIVE),
        *((f"{key}=1.5", rf"{key} must lie in \[0, 1\], got 1.5") for key in limits.SHARES),
        *((f"{key}=-1", f"{key} must be at least 0, got -1") for key in limits.NOT_NEGATIVE),
        *((f"{key}={most + 1}", f"{key} must be at most {most}, got {most + 1}") for key, most in limits.AT_MOST.items()),
        ("problems.held_out=1e12", "problems.held_out must be at most 10000000 for problems that are made, not read, got 1000000000000"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be finite, got nan"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate must be finite, got inf"),
        ("loss.clip_high=.inf", "loss.clip_high must be finite, got inf"),
        ("stages.switch_slope=nan", "stages.switch_slope must be finite, got nan"),
        ("optimizer.beta1=1", r"optimizer.beta1 must lie in \[0, 1\), got 1.0"),
        ("optimizer.beta2=-0.1", r"optimizer.beta2 must lie in \[0, 1\), got -0.1"),
        ("entropy.max_weight=1e-9", "entropy.max_weight must be at least entropy.min_weight"),
        ("problems.distractors=-1", "problems.distractors must be at least 0, got -1"),
        ("problems.wrong_low=0.9 problems.wrong_high=0.3", "problems.wrong_high must be at least problems.wrong_low = 0.9, got 0.3"),
        ("rollout.group_size=1", "rollout.group_size must be at least 2: a group of one has no advantage over itself .*, got 1"),
        ("rollout.exploration=0.9", "rollout.exploration must be at least 1, .*, got 0.9"),
        ("rollout.exploration=inf", "rollout.exploration must be finite, got inf"),
        ("method=grpo rollout.group_size=1", "rollout.group_size must be at least 2: .*method grpo"),
        ("segmenter.max_tokens=4", "segmenter.max_tokens must be at least segmenter.min_tokens = 8, got 4"),
        ("credit.bound=1", r"credit.bound must lie in \[0, 1\), got 1.0"),
        ("stages.confidence=1", r"stages.confidence must lie in \[0, 1\), .*, got 1.0"),
        ("attribution.reliability=-0.5", r"attribution.reliability must lie in \[0, 1\], or be -1 to measure it, got -0.5"),
        ("attribution.reliability=1.1", "attribution.reliability must lie in"),
        ("attribution.source=tre", r"attribution.source must be 'none' or some of .*, got 'tre'; did you mean 'tree'\?"),
        ("attribution.source=tree,tree", "attribution.source must be .*, each once"),
        ("attribution.source=tree,none", "attribution.source must be"),
        ("attribution.source=tree credit.form=ratio", "credit.form = 'ratio' needs attribution.source = 'hindsight', got 'tree'"),
        (
            "attribution.source=hindsight credit.form=ratio credit.mask=none attribution.reliability=0",
            "attribution.reliability must be -1.0 with credit.form = 'ratio', got 0.0",
        ),
        ("attribution.control=shuffled credit.form=branch", "attribution.control must be 'none' with credit.form = 'branch', got 'shuffled'"),
        ("problems.hint=x{answer}{prompt}", "problems.hint does nothing with problems.task = '.*': it must be '', got 'x{answer}{prompt}'"),
        ("problems.question=foo", "problems.question does nothing with problems.task = '.*': it must be 'problem', got 'foo'"),
        ("attribution.source=hindsight credit.form=ratio", "credit.mask = 'unchanged' does nothing with credit.form = 'ratio': it must be 'none'"),
        ("attribution.source=none", "credit.form = 'additive' needs an attribution.source, got 'none'"),
        ("attribution.source=tree credit.scope=zero_variance", "credit.scope must be 'own' or 'all' with 'tree' in attribution.source"),
        ("rollout.prompts=1 rollout.group_size=2 loss.minibatches=3", "loss.minibatches must be at most the rollouts of a step, 2"),
        ("problems.path=x.jsonl", "one of problems.task and problems.path must be given, got both"),
        ("problems.task=", "one of problems.task and problems.path must be given, got neither"),
        ("policy.path=x", "one of policy.path and policy.from_config must be given, got both"),
        ("policy.from_config=", "one of policy.path and policy.from_config must be given, got neither"),
        ("problems.task= problems.path=x.jsonl warmup.steps=3", "warmup.steps needs a synthetic task"),
        ("problems.task= problems.path=x.jsonl problems.template=Q:", r"problems.template must hold \{problem\}"),
        ("problems.task= problems.path=x.jsonl problems.hint=Answer", r"problems.hint must hold \{answer\} and \{prompt\}"),
    ],
)
def test_checks(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [*BASE, *overrides.split()])


@pytest.mark.parametrize("method", METHODS)
def test_method_is_its_settings(method):
    chosen = load(None, [*BASE, f"method={method}"])
    assert chosen.method == method
    assert {key: value_of(chosen, key) for key in METHODS[method]} == METHODS[method]


def test_the_defaults_are_the_method():
    assert config.to_dict(load(None, BASE)) == config.to_dict(load(None, [*BASE, "method=acpo"]))


def test_methods_name_the_same_settings_and_differ_in_them():
    loaded = [load(None, [*BASE, f"method={m}"]) for m in METHODS]
    expanded = [{key: value_of(chosen, key) for key in config.keys(Config) if key != "method"} for chosen in loaded]
    assert all(a != b for i, a in enumerate(expanded) for b in expanded[:i])
    assert {key for m in METHODS.values() for key in m} <= set(config.keys(Config))


def test_a_layers_own_keys_stand_over_its_method(tmp_path):
    chosen = from_file(tmp_path, "method: grpo\nstages: {two: true}")
    assert chosen.stages.two and chosen.credit.form == "none"
    chosen = load(None, [*BASE, "entropy.controller=constant", "method=grpo"])  # in any order
    assert chosen.entropy.controller == "constant"


def test_method_of_the_command_line_turns_the_files_into_its_own(tmp_path):
    chosen = from_file(tmp_path, "method: acpo\nstages: {two: true}\nrollout: {prompts: 3}", "method=grpo")
    assert not chosen.stages.two, "what makes the method comes from the later layer"
    assert chosen.attribution.source == "none" and chosen.rollout.prompts == 3


def test_method_of_the_file_leaves_nothing_behind(tmp_path):
    """GSPO brings a clip range of its own, which plain GRPO must not inherit."""
    assert from_file(tmp_path, "method: gspo").loss.clip_low == 3e-4
    assert from_file(tmp_path, "method: gspo", "method=grpo") == from_file(tmp_path, "method: grpo")
    assert from_file(tmp_path, "method: gspo\nloss: {clip_low: 0.1}", "method=grpo").loss.clip_low == 0.1
    with pytest.raises(ConfigError, match=r"some\.yaml: method must be one of"):
        from_file(tmp_path, "method: gsop", "method=grpo")


@pytest.mark.parametrize("method", METHODS)
def test_a_written_configuration_reads_back(tmp_path, method):
    chosen = load(None, [*BASE, "name=010", f"method={method}", "optimizer.learning_rate=2e-4", "run_dir=~/x"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(chosen), sort_keys=False), encoding="utf-8")
    assert load(path) == chosen
    assert layers.differences(config.to_dict(load(path)), config.to_dict(chosen)) == []


def test_differences_name_the_settings():
    a, b = (config.to_dict(load(None, [*BASE, f"trainer.steps={n}"])) for n in (3, 4))
    assert layers.differences(a, b) == ["trainer.steps: 3 -> 4"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_of_the_repository_load(path):
    more = [] if path.stem == "arithmetic" else ["problems.path=x.jsonl", "policy.path=y"]
    for method in METHODS:
        assert load(path, [*more, f"method={method}"]).method == method


# --- the method's settings in another framework's loop -------------------------------------------------------------------------------


def test_method_settings_nested_or_dotted():
    found = config.method_settings({"credit": {"form": "weights"}, "entropy.weight": "2e-3"}, "here")
    assert found.credit.form == "weights" and found.entropy.weight == 2e-3 and found.attribution == config.Config().attribution
    assert config.method_settings({}, "here") == config.Config()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"credit.from": "weights"}, "here: unknown setting 'credit.from'; the nearest is 'credit.form'"),
        ({"credit": {"form": "weight"}}, "here: credit.form must be one of"),
        ({"attribution.source": "trees"}, "attribution.source must be 'none' or some of"),
        ({"trainer.steps": 3}, "here: 'trainer.steps' belongs to our own loop; wanted settings of segmenter, attribution"),
        ({"method": "grpo"}, "here: 'method' belongs to our own loop"),
    ],
)
def test_method_settings_that_cannot_be(layer, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.method_settings(layer, "here")

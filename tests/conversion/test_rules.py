"""The rule vocabulary: patterns match whole names literally, and tables are exhaustive and unambiguous."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ailurus_hf.conversion import CheckpointError
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.rules import Drop, Rename, SplitRows, Transpose, fill, match, source_of

BLOCK = Rename("blocks.{layer}.norm1.{param:weight|bias}", "layers.{layer}.layernorm_before.{param}")
QKV = SplitRows("blocks.{layer}.qkv.{param:weight|bias}", tuple(f"layers.{{layer}}.{n}_proj.{{param}}" for n in "qkv"))


def test_match_returns_the_placeholders() -> None:
    assert match(BLOCK, "blocks.11.norm1.bias") == {"layer": "11", "param": "bias"}


@pytest.mark.parametrize(
    "key",
    [
        "xblocks.0.norm1.bias",  # anchored at the start
        "blocks.0.norm1.biasx",  # and at the end
        "blocks.0.norm1.bias\n",
        "blocks.0.norm1Xbias",  # a dot is a dot
        "blocksX0.norm1.bias",
        "blocks.00.norm1.bias",  # would become the same name as layer 0
        "blocks.-1.norm1.bias",
        "blocks.٣.norm1.bias",  # a digit, but not one of a tensor name
        "blocks.a.norm1.bias",
        "blocks.0.norm1.running_mean",
        "",
    ],
)
def test_match_is_anchored_and_literal(key: str) -> None:
    assert match(BLOCK, key) is None


def test_regex_characters_in_a_pattern_are_literal() -> None:
    rule = Rename("a+(b)[c].{layer}", "x.{layer}")
    assert match(rule, "a+(b)[c].3") == {"layer": "3"}
    assert match(rule, "aab.3") is None


def test_rest_matches_dots() -> None:
    rule = Drop("mask_decoder.{rest:*}", "not needed")
    assert match(rule, "mask_decoder.layers.0.weight") == {"rest": "layers.0.weight"}
    assert match(rule, "mask_decoder.") is None


@pytest.mark.parametrize("pattern", ["blocks.{Layer}.x", "blocks.{layer.x", "blocks.layer}.x", "blocks.{}.x"])
def test_bad_placeholder_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="placeholder"):
        match(Rename(pattern, "x"), "blocks.0.x")


@given(st.integers(0, 10_000), st.sampled_from(["weight", "bias"]))
def test_source_of_inverts_every_rule(layer: int, param: str) -> None:
    values = {"layer": str(layer), "param": param}
    for rule in (BLOCK, QKV):
        key = fill(rule.pattern, values)
        assert match(rule, key) == values
        assert {source_of(rule, fill(target, values)) for target in rule.targets} == {key}


def test_source_of_is_none_for_other_names() -> None:
    assert source_of(BLOCK, "layers.0.layernorm_before.gamma") is None
    assert source_of(Drop("head.weight", "unused"), "head.weight") is None
    assert source_of(Rename("blocks.{chunk}.{layer}.x", "layers.{layer}.x"), "layers.3.x") is None  # chunk is lost


def test_rules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BLOCK.pattern = "x"  # type: ignore[misc]


def test_map_keys_consumes_each_key_once() -> None:
    rules = (BLOCK, QKV, Transpose("proj", "projection.weight"), Drop("head.weight", "unused"))
    mappings = map_keys(rules, ["blocks.2.norm1.weight", "blocks.0.qkv.bias", "proj", "head.weight"])
    assert [mapping.targets for mapping in mappings] == [
        ("layers.2.layernorm_before.weight",),
        ("layers.0.q_proj.bias", "layers.0.k_proj.bias", "layers.0.v_proj.bias"),
        ("projection.weight",),
        (),
    ]


def test_map_keys_names_unknown_keys() -> None:
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        map_keys((BLOCK,), ["blocks.0.norm1.weight", "extra.weight"])
    with pytest.raises(CheckpointError, match=r"9 keys .* a, b, c, d and 5 more"):
        map_keys((BLOCK,), list("abcdefghi"))


def test_map_keys_refuses_two_rules_for_one_key() -> None:
    with pytest.raises(RuntimeError, match="2 rules"):
        map_keys((BLOCK, Drop("blocks.{rest:*}", "unused")), ["blocks.0.norm1.weight"])


def test_map_keys_refuses_two_keys_for_one_name() -> None:
    with pytest.raises(CheckpointError, match=r"a.x and b.x .* both become x"):
        map_keys((Rename("{part:a|b}.x", "x"),), ["a.x", "b.x"])


def test_every_rule_must_be_used_unless_optional() -> None:
    optional = Drop("head.weight", "unused", optional=True)
    mappings = map_keys((BLOCK, QKV, optional), ["blocks.0.norm1.weight"])
    check_rules_used((BLOCK, optional), mappings)
    with pytest.raises(CheckpointError, match="qkv"):
        check_rules_used((BLOCK, QKV, optional), mappings)

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from shared.config import MAX_BYTES, Section, differences, dump, load, parse, schema
from shared.errors import ConfigError


class Round(Section):
    """A member of a union."""

    kind: Literal["round"] = "round"
    radius: float = Field(1.0, gt=0, description="the distance from the centre")


class Square(Section):
    """Another member."""

    kind: Literal["square"]
    side: int = Field(1, ge=1, le=9)


class Inner(Section):
    """A section."""

    rate: float = Field(0.5, ge=0, le=1, description="the share that is kept")
    flag: bool = False
    names: tuple[str, ...] = ()


class Outer(Section):
    """A whole configuration."""

    paper: Literal["alpha"] = "alpha"
    count: int = 1
    scale: float = 1.0
    text: str = "-"
    maybe: int | None = None
    inner: Inner = Inner()
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, Outer, overrides, source="a.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-4"])
def test_every_way_to_write_a_small_number_is_that_number(text):
    assert parse(f"scale: {text}", Outer).scale == 1e-4
    assert parse("{}", Outer, [f"scale={text}"]).scale == 1e-4


@pytest.mark.parametrize(
    "text", ["010", "3:25", "0x10", "0o10", "0b1", "1_000", "off", "1.0", "true", "null", "'1'", "1 2"]
)
def test_what_is_not_plainly_a_whole_number_is_refused_where_one_is_wanted(text):
    (line,) = problems(f"\ncount: {text}")
    assert line.startswith("a.yaml:2: count: ")
    (line,) = problems("{}", f"count={text}")
    assert line.startswith(f"count={text} (command line): count: ")


@pytest.mark.parametrize("text", ["off", "on", "yes", "no", "y", "n", "1", "0", "'true'", "Off"])
def test_what_is_not_true_or_false_is_refused_where_a_flag_is_wanted(text):
    assert problems(f"inner: {{flag: {text}}}")[0].startswith("a.yaml:1: inner.flag: ")


@pytest.mark.parametrize("text", ["off", "010", "3:25", "yes", "2020-01-01", "1_000", "0x10"])
def test_words_that_yaml_1_1_reads_as_something_else_stay_text(text):
    assert parse(f"text: {text}", Outer).text == text


def test_a_number_is_refused_where_text_is_wanted():
    assert "text: 1 does not fit" in problems("text: 1")[0]


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "+.INF", ".NaN", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(text):
    (line,) = problems(f"\nscale: {text}")
    assert line.startswith("a.yaml:2: scale: ")
    assert line.endswith("is not a finite number")
    assert problems("{}", f"scale={text}")[0].startswith(f"scale={text} (command line): scale: ")


def test_python_spellings_of_infinity_are_text_and_refused_as_numbers():
    for text in ("inf", "nan", "Infinity", "NaN"):
        assert "does not fit" in problems(f"scale: {text}")[0]


def test_a_duplicate_key_is_refused_with_the_line_of_the_second():
    assert problems("count: 1\ncount: 2") == ["a.yaml:2: count: is given twice; keep one of them"]
    assert problems("inner:\n  rate: 0.1\n  'rate': 0.1")[0].startswith("a.yaml:3: inner.rate: is given twice")


@pytest.mark.parametrize(
    "text", ["count: &a 1", "count: *a", "count: !!int 1", "!!python/object/apply:os.system ['true']", "count: ! 1",
             "a: &a [1]\nb: [*a, *a]"],
)  # fmt: skip
def test_anchors_aliases_and_tags_are_refused(text):
    assert "anchors, aliases and tags are not supported" in problems(text)[0]


def test_merge_keys_are_no_keys():
    assert "there is no such key" in problems("<<: {count: 2}")[0]


@pytest.mark.parametrize(
    "text", ["count: [1", "a: b: c", "\tcount: 1", "count: 'x", "--- 1\n--- 2", "count: \0", "%YAML 9.9\n--- {}"]
)
def test_broken_yaml_is_one_located_line(text):
    (line,) = problems(text)
    assert line.startswith("a.yaml")
    assert "is not valid YAML" in line


@pytest.mark.parametrize("text", ["", "# only a comment\n", "1", "[1, 2]", "word", "? [1]\n: 2"])
def test_what_is_not_a_mapping_of_words_is_refused(text):
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 5000, "a: " + "{a: " * 400 + "1" + "}" * 400, "inner: " + "[" * 30 + "]" * 30]
)
def test_deep_nesting_is_refused_and_never_a_recursion_error(text):
    assert "nested more than" in problems(text)[0] or "is not valid YAML" in problems(text)[0]


def test_a_number_of_thousands_of_digits_is_refused():
    assert "5000 digits" in problems("count: " + "9" * 5000)[0]


def test_an_unknown_key_names_the_nearest_known_one():
    assert problems("cuont: 1") == ["a.yaml:1: cuont: there is no such key; did you mean 'count'?"]
    assert problems("inner:\n  rte: 1")[0] == "a.yaml:2: inner.rte: there is no such key; did you mean 'rate'?"
    assert problems("shape: {kind: square, sid: 1}")[0].endswith(
        "shape.sid: there is no such key; did you mean 'side'?"
    )
    assert problems("zzz: 1")[0].endswith("known keys: paper, count, scale, text, maybe, inner, shape")


def test_an_unknown_key_that_another_section_has_is_named_whole():
    assert problems("rate: 0.5") == ["a.yaml:1: rate: there is no such key; did you mean 'inner.rate'?"]
    assert problems("inner:\n  count: 1")[0] == "a.yaml:2: inner.count: there is no such key; did you mean 'count'?"
    (line,) = problems("shape: {kind: round, side: 1}")  # only the other kind of shape has it
    assert "did you mean 'shape.side'" not in line


def test_all_problems_come_at_once_each_with_its_line():
    found = problems("count: x\ninner:\n  rate: 1.5\n  flag: off\nshape:\n  kind: square\n  side: 0\ncolour: red")
    assert [line.split(": ")[:2] for line in found] == [
        ["a.yaml:1", "count"], ["a.yaml:3", "inner.rate"], ["a.yaml:4", "inner.flag"], ["a.yaml:7", "shape.side"],
        ["a.yaml:8", "colour"],
    ]  # fmt: skip
    assert found[1] == "a.yaml:3: inner.rate: 1.5 is above 1; it is the share that is kept"


def test_a_wrong_choice_names_the_choices():
    (line,) = problems("shape: {kind: sqare}")
    assert line.startswith(
        "a.yaml:1: shape.kind: unknown value 'sqare'; did you mean 'square'? choose from round, square"
    )


def test_a_missing_key_is_named():
    assert problems("shape: {side: 1}") == ["a.yaml:1: shape.kind: is missing"]


def test_an_override_is_located_on_the_command_line_and_wins():
    assert parse("count: 1", Outer, ["count=2", "inner.rate=0.25", "inner.names=[a, b]"]).inner == Inner(
        rate=0.25, names=("a", "b")
    )
    assert problems("inner: {rate: 0.5}", "inner.rate=7") == [
        "inner.rate=7 (command line): inner.rate: 7 is above 1; it is the share that is kept"
    ]
    assert problems("inner: {rate: 3}", "inner.rate=0.5", "cuont=1") == [
        "cuont=1 (command line): cuont: there is no such key; did you mean 'count'?"
    ]


@pytest.mark.parametrize(
    "override", ["count", "=1", "inner..rate=1", ".=1", "count=1\ncuont: 2", "count=[1", "count=&a 1", "a b"]
)
def test_a_malformed_override_is_refused_and_named(override):
    with pytest.raises(ConfigError, match=r"\(command line\)"):
        parse("count: 1", Outer, [override])


def test_an_empty_override_is_empty_text():
    assert parse("text: a", Outer, ["text="]).text == ""


def test_a_configuration_of_another_paper_is_one_clear_line():
    found = problems("paper: beta\nnonsense: 1\ncount: x")
    assert found == ["a.yaml:1: paper: this is a configuration of 'beta'; this command takes those of 'alpha'"]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path, content in (("none.yaml", None), ("bytes.yaml", b"count: \xff"), ("big.yaml", b"#" * (MAX_BYTES + 1))):
        if content is not None:
            (tmp_path / path).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / path, Outer)
        assert str(caught.value).startswith(str(tmp_path / path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        load(tmp_path, Outer)


def test_a_configuration_cannot_be_changed():
    config = parse("{}", Outer)
    with pytest.raises(ValueError, match="frozen"):
        config.count = 2


def test_differences_name_each_leaf_that_differs():
    old, new = parse("inner: {rate: 0.25}", Outer), parse("{inner: {rate: 0.5}, shape: {kind: square}}", Outer)
    assert differences(old, old) == []
    assert differences(old, new)[0] == "inner.rate: 0.25 -> 0.5"
    assert {line.partition(":")[0] for line in differences(old, new)} == {
        "inner.rate",
        "shape.kind",
        "shape.radius",
        "shape.side",
    }


text_values = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        "1e4",
        "1.5e3",
        "1E5",
        "010",
        "off",
        "~",
        "null",
        "",
        "true",
        "3:25",
        ".inf",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        "&a",
        "*a",
        "!x",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    text=text_values, names=st.lists(text_values, max_size=3), scale=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(-(10**30), 10**30), maybe=st.none() | st.integers(-5, 5),
)  # fmt: skip
def test_dump_and_parse_give_an_equal_configuration(text, names, scale, count, maybe):
    config = Outer(text=text, inner=Inner(names=tuple(names)), scale=scale, count=count, maybe=maybe)
    assert parse(dump(config), Outer) == config


def test_dump_and_parse_give_an_equal_configuration_for_every_file_of_the_repository(repository, papers):
    from importlib import import_module

    files = [path for name in papers for path in sorted((repository / name / "configs").glob("*.yaml"))]
    assert files
    for path in files:
        model = import_module(f"{path.parents[1].name}.config").Config
        config = load(path, model)
        assert parse(dump(config), model) == config, path


def test_the_schema_is_json_and_knows_the_descriptions():
    found = json.loads(schema(Outer))
    assert found["$defs"]["Inner"]["properties"]["rate"]["description"] == "the share that is kept"
    assert found["additionalProperties"] is False


def test_the_path_of_the_file_is_in_each_line(tmp_path):
    path = Path(tmp_path / "run.yaml")
    path.write_text("count: x\nscale: y\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Outer)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:1", f"{path}:2"]


def test_a_section_given_by_its_name_can_be_refined_by_an_override():
    from fedloge.config import Config
    from shared.cli import find_config
    from shared.config import load

    config = load(find_config("smoke", "fedloge"), Config, ["method=fedprox", "method.mu=0.5"])
    assert config.method.model_dump() == {"name": "fedprox", "mu": 0.5}

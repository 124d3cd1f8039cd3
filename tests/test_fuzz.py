"""Whatever is in a configuration or on the command line: it is valid, or it is refused in words. 2,000 tries each."""

import random
import re
import time

import pytest

from shared.config import parse
from shared.errors import ConfigError

each_paper = pytest.mark.parametrize("paper", ["fedloge", "mdcs", "lightcnn", "sparsevit"])
TRIES = 2000
VALUES = (
    "1", "-1", "0", "1e-4", "1e400", "-1e999", ".nan", ".INF", "010", "off", "true", "null", "~", "''", "'x'",
    "\"\\ud800\"",
    "[]", "{}", "[1, [2, {a: 3}]]", "{name: creff}", "{name: {name: a}}", "3:25", "&a 1", "*a", "!!int 1", "- 1", "? a",
    "|",
    "9" * 400, "9" * 250, "0x1F", "\x00", "\u2028", "é", "\U0001f600", "<<", "%", "@", "`", "2024-01-01",
    "[" * 50, "{a: " * 40,
    "sample", "list", "fedprox", "resnet34", "cuda", "paper", "-0.0", "1_0", "+.inf", "1.", ".5e-3", "\"a\\nb\"",
    "[-0.5, 1.0, 2.5]", "[1.0, x]", "[3, 2]", "{name: dl, lambdas: []}", "{name: ce, views: both}", "split", "ncl",
    "{name: cosine, factor: 1}",
)  # fmt: skip
PLAUSIBLE = ("1", "2", "10", "0.5", "1e-4", "none", "auto", "sample")


@pytest.fixture(scope="module")
def texts(repository, papers):
    """(model, text) of every configuration of a package; the test is skipped where that is not built yet."""
    from importlib import import_module

    def of(paper):
        if paper not in papers:
            pytest.skip(f"{paper} is not built yet")
        model = import_module(f"{paper}.config").Config
        files = sorted((repository / paper / "configs").glob("*.yaml"))
        return [(model, path.read_text(encoding="utf-8")) for path in files]

    return of


def mutated(text: str, draws: random.Random) -> str:
    """The text after one random change of a byte, a line, a key, a value or the nesting."""
    lines = text.splitlines()
    place = draws.randrange(len(lines))
    kind = draws.randrange(9)
    if kind == 0:
        at = draws.randrange(len(text))
        return text[:at] + chr(draws.choice([draws.randrange(128), draws.randrange(0xD800)])) + text[at + 1 :]
    if kind == 1:
        at = draws.randrange(len(text))
        return text[:at] + text[at + draws.randint(1, 30) :]
    if kind == 2:
        lines.insert(place, draws.choice(lines))
    elif kind == 3:
        del lines[place]
    elif kind == 4:  # another value
        lines[place] = re.sub(
            r": *[^:,}]*", lambda _: f": {draws.choice(draws.choice([VALUES, PLAUSIBLE]))}", lines[place], count=1
        )
    elif kind == 5:  # another key
        words = re.findall(r"\w+(?=:)", text)
        lines[place] = re.sub(
            r"\w+(?=:)", lambda _: draws.choice([*words, "x", "'a b'", "1", "~"]), lines[place], count=1
        )
    elif kind == 6:  # deeper, or less deep
        lines[place] = draws.choice(["  ", "    ", "\t", "- "]) + lines[place].strip()
    elif kind == 7:
        lines[place] += draws.choice([" {", "}", " [", "]", ":", " #", " : 1", ", a: 1", "'", '"'])
    else:
        draws.shuffle(lines)
    return "\n".join(lines) + "\n"


def random_override(text: str, draws: random.Random) -> str:
    words = re.findall(r"\w+(?=:)", text)
    parts = [draws.choice([*words, "name", "0", "x", "", "seed"]) for _ in range(draws.randint(1, 3))]
    if draws.random() < 0.3:
        return draws.choice(["seed", "optimizer.lr", "device", "batch_size"]) + "=" + draws.choice(PLAUSIBLE)
    return ".".join(parts) + draws.choice(["=", "=", "=", "", "=="]) + draws.choice(draws.choice([VALUES, PLAUSIBLE]))


@each_paper
def test_two_thousand_fuzzed_configurations_are_valid_or_refused_in_words(paper, texts):
    known = texts(paper)
    draws, started, valid, refused = random.Random(0), time.monotonic(), 0, 0
    for _ in range(TRIES):
        model, text = draws.choice(known)
        text = text.partition("\n\n")[2] or text  # without the header comment: changing it changes nothing
        overrides = [random_override(text, draws) for _ in range(draws.choice([0, 0, 1, 2]))]
        for _ in range(draws.choice([0, 1, 1, 2]) if overrides else draws.choice([1, 1, 2, 3])):
            text = mutated(text, draws)
        try:
            config = parse(text, model, overrides, source="fuzz.yaml")
        except ConfigError as error:
            refused += 1
            for line in str(error).splitlines():
                assert line.startswith("fuzz.yaml") or "(command line)" in line, (line, text, overrides)
        else:
            valid += 1
            assert isinstance(config, model)
    assert valid > TRIES / 40, "the mutations must leave something valid, or they test one error only"
    assert refused > TRIES / 2
    assert time.monotonic() - started < 40


@each_paper
def test_random_bytes_as_a_configuration_are_refused_in_words(paper, texts, tmp_path):
    from shared.config import load

    draws, model = random.Random(1), texts(paper)[0][0]
    for _ in range(200):
        (tmp_path / "a.yaml").write_bytes(draws.randbytes(draws.randint(0, 60)))
        with pytest.raises(ConfigError):
            load(tmp_path / "a.yaml", model)


@each_paper
def test_fuzzed_command_lines_end_with_exit_code_2_and_one_message(paper, papers, capsys, tmp_path):
    if paper not in papers:
        pytest.skip(f"{paper} is not built yet")
    from importlib import import_module

    main = import_module(f"{paper}.train").main
    draws = random.Random(2)
    words = ["--config", "smoke", "nothing", "a" * 5000, "--resume", str(tmp_path), "/proc", "x=", "=", "seed=-1",
             "seed=1e9", "optimzer.lr=1", "", "--config=", "--config=/"]  # fmt: skip
    for _ in range(150):
        arguments = [draws.choice(words) for _ in range(draws.randint(0, 4))]
        try:
            code = main(["--out", str(tmp_path / "out"), *arguments, "nonsense.key=1"])  # never a valid run
        except SystemExit as stop:  # argparse
            code = stop.code
        printed = capsys.readouterr()
        assert code == 2, arguments
        assert "error: " in printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""
    assert not (tmp_path / "out").exists()

"""What stands in the published CSVs, column by column: the kinds of value that `results/README.md` documents."""

import csv
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from shared.errors import DataError
from shared.gpu import Precision

REPOSITORY = Path(__file__).resolve().parents[1]
PAPERS = tuple(sorted(path.parent.name for path in REPOSITORY.glob("*/reproduce.py")))
SHARE = re.compile(
    r"(?:.*\.)?(?:accuracy|validation|many|medium|few|head|middle|tail|ece|balanced|worst_decile|spread|disagreement|"
    r"class_std|recovered|silent|zero_share|area|mean_\d+_\d+|(?:bias|variance)(?:_\w+)?)"
)
DIFFERENCE = re.compile(r"(?:.*\.)?(?:ensemble_gain|drop(?:_\d+_\d+)?)|(?:cs_gain|effect)\.\w+")  # of two shares
COUNT = re.compile(
    r"(?:.*\.)?(?:parameters|multiply_adds|macs|nonzero|bytes|csr_bytes|prunable)|(?:parameters|images|sent|bytes)\.\w+"
)
Test = Callable[[str], bool]


def matches(pattern: str) -> Test:
    """Whether a value is the pattern, whole."""
    return lambda value: re.fullmatch(pattern, value) is not None


def number(value: str, low: float = -math.inf) -> bool:
    """Whether a value is a finite number, not below `low`."""
    try:
        found = float(value)
    except ValueError:
        return False
    return math.isfinite(found) and found >= low


def positive(value: str) -> bool:
    """Whether a value is a finite number that is not negative."""
    return number(value, 0.0)


def share(value: str) -> bool:
    """Whether a value is a number from 0 to 1."""
    return number(value, 0.0) and float(value) <= 1


def or_empty(test: Test) -> Test:
    """A value of that kind, or none."""
    return lambda value: value == "" or test(value)


WORD, COUNTED, TEXT = matches(r"[\w.+-]+"), matches(r"0|[1-9]\d*"), matches(r"\S(?:.*\S)?")
COMMIT, MADE_BY = matches(r"[0-9a-f]{40}"), matches(r"python -m \w+\.\w+ \S.*")
RESULTS: Mapping[str, Test] = {
    "paper": lambda value: value in PAPERS,
    "config": WORD,
    "method": WORD,
    "seed": COUNTED,
    "at": matches(r"last[1-9]\d*|final|last_epoch|best_on_test|once"),
    "split": matches(r"train|validation|test|-"),
    "metric": WORD,
    "value": number,
    "device": TEXT,
    "precision": lambda value: value in get_args(Precision) and value != "auto",
    "commit": COMMIT,
    "seconds": positive,
    "command": MADE_BY,
}
BENCHMARKS: Mapping[str, Test] = {
    "benchmark": TEXT,
    "setting": TEXT,
    "ours": number,
    "reference": or_empty(number),
    "ratio": or_empty(positive),
    "ratio_q1": or_empty(positive),
    "ratio_q3": or_empty(positive),
    "unit": TEXT,
    "n": COUNTED,
    "device": TEXT,
    "threads": COUNTED,
    "torch": TEXT,
    "commit": COMMIT,
}
CLIENTS: Mapping[str, Test] = {
    "round": COUNTED,
    "client": COUNTED,
    "images": COUNTED,
    "epochs": COUNTED,
    "seconds": positive,
    "images_per_second": positive,
    "loss": number,
}
LAYOUT = matches(r"NCHW|channels_last")
LATENCY: Mapping[str, Test] = {
    "images": TEXT,
    "network": TEXT,
    "parameters": COUNTED,
    "bytes.weights": COUNTED,
    "bytes.safetensors": COUNTED,
    "bytes.int8": COUNTED,
    "multiply_adds": COUNTED,
    "one.layout": LAYOUT,
    "one.ms": positive,
    "one.ms_q1": positive,
    "one.ms_q3": positive,
    "batch.layout": LAYOUT,
    "batch.ms": positive,
    "batch.ms_q1": positive,
    "batch.ms_q3": positive,
    "n": COUNTED,
    "device": TEXT,
    "threads": COUNTED,
    "torch": TEXT,
    "commit": COMMIT,
}
TIMINGS: Mapping[str, Test] = {
    "network": TEXT,
    "batch": COUNTED,
    "parameters": COUNTED,
    "macs": COUNTED,
    "seconds": positive,
    "seconds_q1": positive,
    "seconds_q3": positive,
    "times_as_fast": positive,
    "images_per_second": positive,
    "n": COUNTED,
    "device": TEXT,
    "precision": matches("float32|float16"),
    "torch": or_empty(TEXT),
    "commit": or_empty(COMMIT),
    "command": MADE_BY,
}
CHOICE: Mapping[str, Test] = {
    "arm": WORD,
    "coefficient": or_empty(positive),
    "term_share": or_empty(positive),
    "held_out": share,
    "difference": or_empty(number),
    "deviation": or_empty(positive),
    "low": or_empty(number),
    "high": or_empty(number),
    "seeds": matches(r"\d+(?: \d+)*"),
    "command": MADE_BY,
}
SCHEMAS: Mapping[str, Mapping[str, Test]] = {
    "results.csv": RESULTS, "runs.csv": RESULTS, "benchmarks.csv": BENCHMARKS, "clients.csv": CLIENTS,
    "latency.csv": LATENCY, "timings.csv": TIMINGS, "choice.csv": CHOICE,
}  # fmt: skip


def read_lines(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV and its lines as text; DataError if it cannot be read as one."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="", restkey="too many", strict=True)
            lines = [{str(key): str(value) for key, value in line.items()} for line in reader]
            return list(reader.fieldnames or ()), lines
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name}: cannot be read as CSV: {reason}") from None


def value_problem(line: Mapping[str, str]) -> str | None:
    """What is wrong with a figure's size: a share outside [0, 1], a difference of shares outside [-1, 1], no count."""
    metric, value = line["metric"], float(line["value"])
    if DIFFERENCE.fullmatch(metric):
        wrong = abs(value) > 1
        return f"value: {metric} is a difference of shares, but {line['value']} is not in [-1, 1]" if wrong else None
    if SHARE.fullmatch(metric) and not 0 <= value <= 1:
        return f"value: {metric} is a share, but {line['value']} is not in [0, 1]"
    if COUNT.fullmatch(metric) and (value < 0 or value != int(value)):
        return f"value: {metric} is a count, but {line['value']} is none"
    return None


def format_problems(name: str, columns: list[str], lines: list[dict[str, str]]) -> list[str]:
    """Wrong columns, or each line's first value that is not of its column's kind, as `line: column: problem`."""
    schema = SCHEMAS.get(name)
    if schema is None:
        return [f"has no documented schema; the CSVs are {', '.join(SCHEMAS)}"]
    if columns != list(schema):
        return [f"has the columns {','.join(columns)} instead of {','.join(schema)}"]
    if not lines:
        return ["holds no line"]
    problems = []
    for number_of_line, line in enumerate(lines, 2):
        wrong = next((c for c, fits in schema.items() if not fits(line[c])), None)
        if "too many" in line:
            problems.append(f"{number_of_line}: has more values than columns")
        elif wrong:
            problems.append(f"{number_of_line}: {wrong}: {line[wrong]!r} does not fit (results/README.md)")
        elif schema is RESULTS and (problem := value_problem(line)):
            problems.append(f"{number_of_line}: {problem}")
    return problems

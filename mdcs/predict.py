"""Name what is in pictures: `python -m mdcs.predict RUN image.png --expert 2`; RUN or an exported folder."""

import sys
from collections.abc import Sequence

from mdcs.export import build, options, take
from shared.cli import run_main
from shared.predict import predict_command


def run_predict(arguments: Sequence[str]) -> int:
    """The command."""
    return predict_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_predict, arguments)


if __name__ == "__main__":
    sys.exit(main())

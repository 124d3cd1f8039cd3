"""Name what is in pictures: `python -m sparsevit.predict RUN a.png --pruned heads.50`; RUN or an exported folder."""

import sys
from collections.abc import Sequence

from shared.cli import run_main
from shared.predict import predict_command
from sparsevit.export import build, options, take


def run_predict(arguments: Sequence[str]) -> int:
    """The command."""
    return predict_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_predict, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The `tritonsparse` command: `doctor`, what runs here and what a model would get; `bench`, one layer timed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor, layer_bench

__all__ = ["main"]

USAGE = """usage: tritonsparse COMMAND [options]

    doctor    versions, GPU, and the back end, regime and predicted cost of each layer of a model
    bench     one layer's training step, dense and sparse, timed in one run

tritonsparse COMMAND --help says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "bench":
        return layer_bench.main(arguments[1:], prog="tritonsparse bench")
    if arguments and arguments[0] == "doctor":
        return _doctor(arguments[1:])
    helped = not arguments or arguments[0] in ("-h", "--help")
    if not helped:
        print(f"tritonsparse: expected a command, doctor or bench, got {arguments[0]!r}", file=sys.stderr)
    print(USAGE, file=sys.stdout if helped else sys.stderr)
    return 0 if helped else 2


def _doctor(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tritonsparse doctor",
        description=doctor.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", help="a folder, or a hub name, that holds a config.json")
    parser.add_argument("--pattern", default="unstructured", help="shape of the masks, %(default)s by default")
    parser.add_argument("--density", type=float, default=0.2, help="blocks kept of a layer, %(default)s by default")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, %(default)s by default")
    parser.add_argument("--device_name", help='a GPU to predict for, as "NVIDIA H200"; the one here by default')
    args = parser.parse_args(arguments)
    rows = doctor.environment()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if args.model_name_or_path is None:
        return 0
    try:
        model = doctor.configured(args.model_name_or_path)
        layers, skipped = doctor.outlook(
            model, args.tokens, args.device_name, pattern=args.pattern, density=args.density
        )
    except (OSError, ValueError, RuntimeError) as error:
        print(f"tritonsparse doctor: {error}", file=sys.stderr)
        return 1
    doctor.show(layers, skipped)
    return 0


if __name__ == "__main__":
    sys.exit(main())

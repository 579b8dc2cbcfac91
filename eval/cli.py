"""The `tritonsparse` command: `doctor`, what runs here and what a model would get; `bench`, one layer timed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import doctor, layer_bench
from .command_line import COUNT, PATTERN, TEXT, Parser, one_line, real

__all__ = ["main"]

USAGE = """usage: tritonsparse COMMAND [options]

    doctor    versions, GPU, and the back end, regime and predicted cost of each layer of a model
    bench     one layer's training step, dense and sparse, timed in one run

tritonsparse COMMAND --help says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    return one_line(lambda: _command(arguments[0], arguments[1:]))


def _command(name: str, arguments: list[str]) -> int:
    if name == "bench":
        return layer_bench.run(arguments, "tritonsparse bench")
    if name != "doctor":
        raise ValueError(
            f"tritonsparse: expected a command, doctor or bench, got {name!r}; tritonsparse --help says more"
        )
    args = doctor_parser().parse_args(arguments)
    rows = doctor.environment()
    width = max(len(name) for name, _ in rows)
    found = None
    if args.model_name_or_path is not None:
        found = doctor.outlook(
            doctor.configured(args.model_name_or_path), args.tokens, args.device_name,
            pattern=args.pattern, density=args.density,
        )  # fmt: skip
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if found is not None:
        doctor.show(*found)
    return 0


def doctor_parser() -> Parser:
    """The options of `tritonsparse doctor`."""
    parser = Parser("doctor", doctor.__doc__, "tritonsparse doctor")
    add = parser.add_argument
    add("--model_name_or_path", type=TEXT, help="a folder, or a hub name, that holds a config.json")
    add("--pattern", type=PATTERN, default="unstructured", help="shape of the masks, %(default)s by default")
    add(
        "--density", type=real(0.0, 1.0, open_below=True), default=0.2,
        help="blocks kept of a layer, %(default)s by default",
    )  # fmt: skip
    add("--tokens", type=COUNT, default=8192, help="of a step, %(default)s by default")
    add("--device_name", type=TEXT, help='a GPU to predict for, as "NVIDIA H200"; the one here by default')
    return parser


if __name__ == "__main__":
    sys.exit(main())

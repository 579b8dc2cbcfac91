"""Command lines of the training programs: transformers' names, recipes as TOML files, strict about both.

A recipe is a TOML file whose top-level keys are argument names and whose table [method_args] holds fields of
the method. What the command line says goes before the recipe, the recipe before the defaults. A method named on
the command line leaves the recipe's [method_args] behind unless it is the recipe's own; a saved model leaves
the recipe's sizes.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Collection, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from tritonsparse.eval.command_line import (
    BELOW_ONE,
    COUNT,
    JSON_OBJECT,
    NATURAL,
    NON_NEGATIVE,
    PATTERN,
    POSITIVE,
    SEED,
    TEXT,
    Parser,
    Value,
    one_of,
)
from tritonsparse.flops import CONVENTIONS
from tritonsparse.layers.backend import BACKENDS
from tritonsparse.methods import METHODS

__all__ = [
    "SCHEDULES",
    "add_common",
    "add_model",
    "parse",
    "read_recipe",
    "recipe_names",
    "refuse_beside_a_saved_model",
]

# transformers' schedules that need no more than a warm-up and a length.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
_LOCAL = ("output_dir", "resume_from_checkpoint", "recipe", "help")
# What a saved model brings along.
_FROM_SCRATCH = ("preset", "initialisation", "vocab_size", "min_count", "dropout", "dropatt")
_LENGTHS = ("num_train_epochs", "max_train_steps")
_STEPS_OR_EPOCH = Value(
    "a whole number of steps of at least 1, or 'epoch'", (int, str),
    lambda word: word if word == "epoch" else COUNT.read(word),
    lambda value: value == "epoch" if isinstance(value, str) else COUNT.fits(value),
)  # fmt: skip


def add_model(
    parser: argparse.ArgumentParser, checkpoint: str, presets: Collection[str], default: str
) -> Callable[..., argparse.Action]:
    """The group "model": a saved one, or one from scratch. Returns what adds options to it.

    checkpoint: the kind of saved model, for people. default: the preset where none is named.
    """
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", type=TEXT, default=None, help=f"{checkpoint} to go on from")
    names = ", ".join(presets)
    add("--preset", type=one_of(presets), default=None, help=f"from scratch: {names} ({default} by default)")
    return add


def add_common(parser: Parser, schedules: Sequence[str] = SCHEDULES) -> None:
    """Arguments that every training program has."""
    add = parser.add_argument
    add("--recipe", type=TEXT, help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    add("--output_dir", type=TEXT, default=None, help="where checkpoints and results go (required)")
    add("--seed", type=SEED, default=0)
    add = parser.add_argument_group("sparsity").add_argument
    add("--method", type=one_of(METHODS), default="autosparse", help=f"one of: {', '.join(METHODS)}")
    add("--sparsity", type=BELOW_ONE, default=None, help="in [0, 1), for methods that take it")
    add("--pattern", type=PATTERN, default="unstructured")
    add("--backend", type=one_of(BACKENDS), default="auto", help=f"one of: {', '.join(BACKENDS)}")
    add("--include", type=TEXT, nargs="+", default=None, help="fnmatch patterns of module names")
    add("--exclude", type=TEXT, nargs="+", default=None, help="fnmatch patterns of module names")
    add("--flops_convention", type=one_of(CONVENTIONS), default="autosparse", help=f"one of: {', '.join(CONVENTIONS)}")
    add("--method_args", type=JSON_OBJECT, default=None, help="fields of the method, as a JSON object")
    add(
        "--record_reference_losses", type=TEXT, default=None,
        help="JSON file for a dense run's epoch losses, for --auto_tune",
    )  # fmt: skip
    add(
        "--auto_tune", type=TEXT, default=None,
        help="that file, or a dense run's all_results.json: AutoSparse tunes alpha by it",
    )  # fmt: skip
    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=NON_NEGATIVE, default=7e-4)
    add("--adam_beta1", type=BELOW_ONE, default=0.9)
    add("--adam_beta2", type=BELOW_ONE, default=0.98)
    add("--adam_epsilon", type=POSITIVE, default=1e-9)
    add("--weight_decay", type=NON_NEGATIVE, default=0.0)
    add("--lr_scheduler_type", type=one_of(schedules), default="inverse_sqrt", help=f"one of: {', '.join(schedules)}")
    add("--num_warmup_steps", "--warmup_steps", type=NATURAL, default=4000)
    add("--num_train_epochs", type=COUNT, default=None)
    add("--max_train_steps", "--max_steps", type=COUNT, default=None)
    add("--gradient_accumulation_steps", type=COUNT, default=1)
    add("--max_grad_norm", type=NON_NEGATIVE, default=0.0, help="0 does not clip")
    add("--mixed_precision", type=one_of(("no", "fp16", "bf16")), default=None, help="no, fp16 or bf16")
    add = parser.add_argument_group("state and tracking").add_argument
    add("--checkpointing_steps", type=_STEPS_OR_EPOCH, default=None, help="a number of steps, or 'epoch'")
    add("--checkpoints_total_limit", type=COUNT, default=None)
    add("--resume_from_checkpoint", type=TEXT, default=None, help="a folder, or 'latest'")
    add("--average_checkpoints", type=NATURAL, default=0, help="average the last N checkpoints at the end")
    add(
        "--save_twins", action=argparse.BooleanOptionalAction, default=False,
        help="keep the best sparse and the best dense model of a run with dense phases: best_sparse, best_dense",
    )  # fmt: skip
    add("--logging_steps", type=COUNT, default=50)
    add("--with_tracking", action=argparse.BooleanOptionalAction, default=False)
    add(
        "--report_to", type=TEXT, default=None,
        help="a tracker of accelerate, such as tensorboard; switches tracking on",
    )  # fmt: skip
    parser.rules.append(lambda args: _refuse_contradictions(parser.program, args))


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv` over the recipe it names; dashes in option names are underscores.

    Raises:
        ValueError: an unknown option, recipe or recipe key, a value that its option does not take, no --output_dir, or
            values that contradict each other.
    """
    argv = [_underscored(word) for word in argv]
    first, _ = parser.parse_known_args(argv)
    if first.recipe is not None:
        parser.set_defaults(**_of_recipe(parser, first, argv))
    args: argparse.Namespace = parser.parse_args(argv)
    if args.report_to == "none":
        args.report_to = None
    elif args.report_to is not None:
        args.with_tracking = True
    return args


def _of_recipe(parser: Parser, first: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The recipe's values, checked, without those that the command line replaces; `first`: its words alone."""
    recipe = read_recipe(first.recipe)
    known = {action.dest: action for action in parser._actions}
    for key in recipe:
        if key not in known or key in _LOCAL:
            raise ValueError(
                f"recipe: expected arguments of this program as keys, got {key!r} in {first.recipe}; see --help"
            )
    for key, value in recipe.items():
        _check(key, value, known[key], first.recipe)
    if first.num_train_epochs is not None or first.max_train_steps is not None:
        # The two say the same thing: one given on the command line replaces either of the recipe.
        recipe = {key: value for key, value in recipe.items() if key not in _LENGTHS}
    if _given("--method", argv) and first.method != recipe.get("method"):
        # The recipe's fields are of its own method; a dense model or a learned sparsity takes no --sparsity.
        recipe.pop("method_args", None)
        if "sparsity" not in METHODS[first.method].__dataclass_fields__:
            recipe.pop("sparsity", None)
        if first.method == "dense":
            recipe.pop("pattern", None)
    if getattr(first, "model_name_or_path", None) is not None:
        recipe = {key: value for key, value in recipe.items() if key not in _FROM_SCRATCH}
    return recipe


def _refuse_contradictions(program: str, args: argparse.Namespace) -> None:
    """Between options of every program.

    Raises:
        ValueError: the first contradiction, named.
    """

    def refuse(expected: str, got: object, remedy: str) -> None:
        raise ValueError(f"{program}: expected {expected}, got {got}; {remedy}")

    if args.output_dir is None:
        refuse("--output_dir", "none", "name a folder for checkpoints and results")
    if args.record_reference_losses is not None and args.method != "dense":
        refuse(
            "--method dense with --record_reference_losses", repr(args.method),
            "the reference of auto-tuning is a dense run",
        )  # fmt: skip
    if (args.num_train_epochs is None) == (args.max_train_steps is None):
        got = "both" if args.max_train_steps is not None else "neither"
        refuse("one of --num_train_epochs and --max_train_steps", got, "give one")
    if args.average_checkpoints and args.checkpointing_steps is None:
        refuse("--checkpointing_steps with --average_checkpoints", "none", "the average is over saved checkpoints")
    least = max(1, args.average_checkpoints)
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < least:
        refuse(
            f"--checkpoints_total_limit of at least {least} (the checkpoints to average)",
            args.checkpoints_total_limit, "raise it",
        )  # fmt: skip


def refuse_beside_a_saved_model(program: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse sizes of a model from scratch beside a saved model, which brings its own.

    Raises:
        ValueError: one of them is given with --model_name_or_path.
    """
    for name in names if args.model_name_or_path is not None else ():
        if getattr(args, name) is not None:
            raise ValueError(
                f"{program}: expected no --{name} beside --model_name_or_path, which brings its own, got "
                f"{getattr(args, name)}; leave one of them out"
            )


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _recipes().iterdir() if entry.name.endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The keys of a recipe, by packaged name or by path.

    Raises:
        ValueError: there is none of that name, or it is no TOML in UTF-8.
    """
    place: Traversable = _recipes().joinpath(f"{name}.toml")
    if name.endswith(".toml"):
        place = Path(name)
        if not place.is_file():
            raise ValueError(f"recipe: expected a TOML file, got {name}, which is not there; correct the path")
    elif name not in recipe_names():
        raise ValueError(f"recipe: expected a .toml file or one of {', '.join(recipe_names())}, got {name!r}; name one")
    try:
        return tomllib.loads(place.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"recipe: expected TOML, got {error} in {name}; correct the file") from error


def _recipes() -> Traversable:
    return resources.files("tritonsparse.train").joinpath("recipes")


def _given(option: str, argv: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in argv)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    name = option[2:].replace("-", "_")
    # argparse spells the other half of a boolean flag --no-flag, with a dash.
    return f"--{'no-' + name[3:] if name.startswith('no_') else name}{equals}{value}"


def _check(key: str, value: Any, action: argparse.Action, recipe: str) -> None:
    """A recipe's value against what its option takes: argparse checks the words of a command line alone."""
    takes: Any = action.type
    if isinstance(action, argparse.BooleanOptionalAction):
        fits, what = isinstance(value, bool), "true or false"
    elif action.nargs == "+":
        fits = isinstance(value, list) and bool(value) and all(takes.takes(each) for each in value)
        what = f"a list, each {takes.what}"
    else:
        fits, what = takes.takes(value), takes.what
    if not fits:
        raise ValueError(f"recipe: expected {key} as {what}, got {value!r} in {recipe}; correct the file")

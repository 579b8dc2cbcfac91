"""Command lines of the training programs: transformers' names, recipes as TOML files, strict about both.

A recipe is a TOML file whose top-level keys are argument names and whose table [method_args] holds fields of
the method. What the command line says goes before the recipe, the recipe before the defaults. A method named on
the command line leaves the recipe's [method_args] behind unless it is the recipe's own; a saved model leaves
the recipe's sizes.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from tritonsparse.flops import CONVENTIONS
from tritonsparse.methods import METHODS

__all__ = ["add_common", "parse", "read_recipe", "recipe_names"]

_LOCAL = ("output_dir", "resume_from_checkpoint", "recipe", "help")
# What a saved model brings along.
_FROM_SCRATCH = ("preset", "vocab_size", "min_count", "dropout", "dropatt")
_LENGTHS = ("num_train_epochs", "max_train_steps")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments that every training program has."""
    add = parser.add_argument
    add("--recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    add("--output_dir", default=None, help="where checkpoints and results go (required)")
    add("--seed", type=int, default=0)
    sparse = parser.add_argument_group("sparsity")
    sparse.add_argument("--method", default="autosparse", help=f"one of: {', '.join(METHODS)}")
    sparse.add_argument("--sparsity", type=float, default=None, help="in [0, 1), for methods that take it")
    sparse.add_argument("--pattern", default="unstructured")
    sparse.add_argument("--backend", default="auto", help="auto, triton or torch")
    sparse.add_argument("--include", nargs="+", default=None, help="fnmatch patterns of module names")
    sparse.add_argument("--exclude", nargs="+", default=None, help="fnmatch patterns of module names")
    sparse.add_argument("--flops_convention", default="autosparse", help=f"one of: {', '.join(CONVENTIONS)}")
    sparse.add_argument("--method_args", type=_json_object, default=None, help="fields of the method, as a JSON object")
    sparse.add_argument(
        "--record_reference_losses", default=None, help="JSON file for a dense run's epoch losses, for --auto_tune"
    )
    sparse.add_argument(
        "--auto_tune", default=None, help="that file, or a dense run's all_results.json: AutoSparse tunes alpha by it"
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--learning_rate", type=float, default=7e-4)
    optim.add_argument("--adam_beta1", type=float, default=0.9)
    optim.add_argument("--adam_beta2", type=float, default=0.98)
    optim.add_argument("--adam_epsilon", type=float, default=1e-9)
    optim.add_argument("--weight_decay", type=float, default=0.0)
    optim.add_argument("--lr_scheduler_type", default="inverse_sqrt")
    optim.add_argument("--num_warmup_steps", "--warmup_steps", type=int, default=4000)
    optim.add_argument("--num_train_epochs", type=int, default=None)
    optim.add_argument("--max_train_steps", "--max_steps", type=int, default=None)
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optim.add_argument("--max_grad_norm", type=float, default=0.0, help="0 does not clip")
    optim.add_argument("--mixed_precision", default=None, choices=("no", "fp16", "bf16"))
    state = parser.add_argument_group("state and tracking")
    state.add_argument("--checkpointing_steps", default=None, help="a number of steps, or 'epoch'")
    state.add_argument("--checkpoints_total_limit", type=int, default=None)
    state.add_argument("--resume_from_checkpoint", default=None, help="a folder, or 'latest'")
    state.add_argument("--average_checkpoints", type=int, default=0, help="average the last N checkpoints at the end")
    state.add_argument(
        "--save_twins", action=argparse.BooleanOptionalAction, default=False,
        help="keep the best sparse and the best dense model of a run with dense phases: best_sparse, best_dense",
    )  # fmt: skip
    state.add_argument("--logging_steps", type=int, default=50)
    state.add_argument("--with_tracking", action=argparse.BooleanOptionalAction, default=False)
    state.add_argument(
        "--report_to", default=None, help="a tracker of accelerate, such as tensorboard; switches tracking on"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv` over the recipe it names; dashes in option names are underscores.

    Raises:
        SystemExit: an unknown option, or a value of the wrong type (argparse's way, exit status 2).
        ValueError: an unknown recipe or recipe key, a recipe's value of the wrong type, no --output_dir, or
            values that contradict each other.
    """
    argv = [_underscored(word) for word in argv]
    first, _ = parser.parse_known_args(argv)
    if first.recipe is not None:
        recipe = read_recipe(first.recipe)
        known = {action.dest: action for action in parser._actions}
        for key in recipe:
            if key not in known or key in _LOCAL:
                raise ValueError(
                    f"recipe: expected arguments of this program as keys, got {key!r} in {first.recipe}; see --help"
                )
            _check_type(key, recipe[key], known[key], first.recipe)
        if first.num_train_epochs is not None or first.max_train_steps is not None:
            # The two say the same thing: one given on the command line replaces either of the recipe.
            recipe = {key: value for key, value in recipe.items() if key not in _LENGTHS}
        if _given("--method", argv) and first.method != recipe.get("method"):
            # The recipe's fields are of its own method; a dense model or a learned sparsity takes no --sparsity.
            recipe.pop("method_args", None)
            fields = getattr(METHODS.get(first.method), "__dataclass_fields__", {})
            if "sparsity" not in fields:
                recipe.pop("sparsity", None)
            if first.method == "dense":
                recipe.pop("pattern", None)
        if getattr(first, "model_name_or_path", None) is not None:
            recipe = {key: value for key, value in recipe.items() if key not in _FROM_SCRATCH}
        parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if args.report_to == "none":
        args.report_to = None
    elif args.report_to is not None:
        args.with_tracking = True
    if args.output_dir is None:
        raise ValueError("arguments: expected --output_dir, got none; name a folder for checkpoints and results")
    if args.record_reference_losses is not None and args.method != "dense":
        raise ValueError(
            f"arguments: expected --method dense with --record_reference_losses, got {args.method!r}; the reference "
            f"of auto-tuning is a dense run"
        )
    for name in ("gradient_accumulation_steps", "logging_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"arguments: expected --{name} of at least 1, got {getattr(args, name)}; correct it")
    if (args.num_train_epochs is None) == (args.max_train_steps is None):
        raise ValueError(
            "arguments: expected one of --num_train_epochs and --max_train_steps, got "
            f"{'both' if args.max_train_steps is not None else 'neither'}; give one"
        )
    for name in _LENGTHS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"arguments: expected --{name} of at least 1, got {value}; correct it")
    if args.checkpointing_steps not in (None, "epoch"):
        if not str(args.checkpointing_steps).isdigit() or int(args.checkpointing_steps) < 1:
            raise ValueError(
                f"arguments: expected --checkpointing_steps as a number of steps or 'epoch', got "
                f"{args.checkpointing_steps!r}; correct it"
            )
        args.checkpointing_steps = int(args.checkpointing_steps)
    if args.average_checkpoints and args.checkpointing_steps is None:
        raise ValueError(
            "arguments: expected --checkpointing_steps with --average_checkpoints, got none; the average is over "
            "saved checkpoints"
        )
    limit = args.checkpoints_total_limit
    if limit is not None and limit < max(1, args.average_checkpoints):
        raise ValueError(
            f"arguments: expected --checkpoints_total_limit of at least {max(1, args.average_checkpoints)} (the "
            f"checkpoints to average), got {limit}; raise it"
        )
    return args


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _recipes().iterdir() if entry.name.endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The keys of a recipe, by packaged name or by path.

    Raises:
        ValueError: there is none of that name, or it is no TOML.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe: expected a TOML file, got {name}, which is not there; correct the path")
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = _recipes().joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"recipe: expected a .toml file or one of {', '.join(recipe_names())}, got {name!r}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
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


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a JSON object, got {text!r} ({error}); quote it for the shell, as in "
            f"'{{\"threshold_init\": -5}}'"
        ) from error
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object, got {text!r}; write {{"field": value}}')
    return fields


def _check_type(key: str, value: Any, action: argparse.Action, recipe: str) -> None:
    """argparse converts the words of a command line, not the defaults that a recipe sets."""
    expected: tuple[type, ...]
    if isinstance(action, argparse.BooleanOptionalAction):
        expected = (bool,)
    elif action.type is _json_object:
        expected = (dict,)
    elif action.nargs == "+":
        expected = (list,)
    elif action.type is int or action.type is float:
        expected = (int,) if action.type is int else (int, float)
    else:
        expected = (str, int) if key == "checkpointing_steps" else (str,)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise ValueError(
            f"recipe: expected {key} as {' or '.join(kind.__name__ for kind in expected)}, got {value!r} in "
            f"{recipe}; correct the file"
        )

"""Saved models as every program loads them: in float32, whole, or refused by name.

transformers gives a checkpoint its own dtype. In bfloat16 a step of 1e-5 rounds away, classifiers meet float32 images,
and ONNX's runtime has no such outputs. Who wants to compute in 16 bits says so, by --mixed_precision or --dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch

from .command_line import reason

__all__ = ["load_beside", "load_pretrained", "load_tokenizer"]

logger = logging.getLogger(__name__)


def load_pretrained(
    program: str, auto_class: Any, name: str, what: str, new: Collection[str] = (), **options: Any
) -> Any:
    """A model whose weights are float32, whatever the checkpoint's are.

    Args:
        program: who asks, for messages.
        auto_class: has `from_pretrained`, such as `AutoModelForCausalLM`.
        name: a local folder, or a hub id.
        what: the kind of checkpoint, for messages.
        new: parameters that begin anew where the checkpoint lacks them or has them of another shape: a head's.
        options: of `from_pretrained`.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or weights are missing or of another shape.
    """
    from transformers import AutoConfig

    try:
        saved = AutoConfig.from_pretrained(name).dtype
        model, info = auto_class.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # whatever transformers, safetensors and pickle make of a damaged file
        raise ValueError(
            f"{program}: expected {what} (a local folder or a reachable hub id), got {name!r} ({reason(error)}); pass "
            f"another, such as a folder that save_pretrained wrote"
        ) from error
    # transformers fills these with random numbers and goes on; those of another shape too, as it was told to.
    lost = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - set(new)
    if lost:
        raise ValueError(
            f"{program}: expected a complete checkpoint, got {name!r} without {', '.join(sorted(lost)[:3])} as its "
            f"configuration has them; export the model with save_pretrained (sparse layers: after finalize())"
        )
    if saved not in (None, torch.float32):
        logger.info("%s: the weights of %s, %s, are loaded as float32", program, name, str(saved).split(".")[-1])
    return model


def load_tokenizer(program: str, name: str) -> Any:
    """The tokenizer beside a saved model.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    return load_beside(program, name, "a tokenizer", lambda: AutoTokenizer.from_pretrained(name))


def load_beside(program: str, name: str, what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns: something that lies beside the saved model `name`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return load()
    except Exception as error:  # as above
        raise ValueError(
            f"{program}: expected {what} beside the model in {name!r}, got none that loads ({reason(error)}); give "
            f"the folder that save_pretrained, or a training run, wrote for both"
        ) from error

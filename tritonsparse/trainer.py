"""`SparseTrainer` and `SparseSeq2SeqTrainer`: transformers' own, made sparse by arguments.

    trainer = SparseTrainer(model, args, train_dataset=data, method="autosparse", sparsity=0.8)
    trainer.train()

The Trainer's own arithmetic gives `total_steps` and `steps_per_epoch`. `TrainingArguments(optim=...)` is respected:
thresholds are moved to a group of their own in the optimizer that it makes. Saves, resumed runs and the best checkpoint
are those of `SparsityCallback`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import get_last_checkpoint

from .api import sparsify
from .callback import SparsityCallback
from .initial_masks import InitialMask
from .methods import Method
from .pattern import Pattern
from .sparsifier import Sparsifier

__all__ = ["SparseSeq2SeqTrainer", "SparseTrainer"]


class SparseTrainer(Trainer):
    """transformers' `Trainer`, made sparse.

    Args:
        model, args, positional, options: as `Trainer` takes them, a model among them: one that `model_init` makes anew
            would be dense.
        method, sparsity, pattern, backend, initial_mask: as `sparsify` takes them.
        sparsifier: one that was made before, of `model`, instead of these.

    Attributes:
        sparsifier: controls the model.

    Raises:
        ValueError: neither a method nor a Sparsifier, or both, or one of another model.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        method: str | Method | None = None,
        sparsity: float | Mapping[str, float] | None = None,
        pattern: str | Pattern = "unstructured",
        backend: str = "auto",
        initial_mask: InitialMask = None,
        sparsifier: Sparsifier | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        if (method is None) == (sparsifier is None):
            raise ValueError(
                f"{name}: expected method= or sparsifier=, got {'neither' if method is None else 'both'}; pass one, as "
                f'in method="gmp", sparsity=0.8'
            )
        if model is None:
            raise ValueError(f"{name}: expected model=, got none; a model that model_init makes anew would be dense")
        if sparsifier is not None and sparsifier.model is not model:
            raise ValueError(f"{name}: expected the Sparsifier of this model, got one of another; pass its own")
        super().__init__(model, args, *positional, **options)
        if sparsifier is None:
            assert method is not None  # checked above
            total, epoch = self._length()
            sparsifier = sparsify(
                model, method, sparsity=sparsity, pattern=pattern, backend=backend, total_steps=total,
                steps_per_epoch=epoch, initial_mask=initial_mask, seed=self.args.seed,
            )  # fmt: skip
        self.sparsifier: Sparsifier = sparsifier
        self._callback = SparsityCallback(sparsifier)
        self.add_callback(self._callback)

    def _length(self) -> tuple[int | None, int | None]:
        """Optimizer steps of the run and of an epoch, as `train` will count them; None without data to train on."""
        if self.train_dataset is None:
            return (self.args.max_steps if self.args.max_steps > 0 else None), None
        values = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return values[6], values[1]

    def create_optimizer(self, *args: Any, **options: Any) -> Optimizer:
        """The Trainer's, with thresholds in a group of their own, attached to the Sparsifier."""
        given = self.optimizer is not None
        optimizer: Optimizer = super().create_optimizer(*args, **options)
        if not given:
            _separate(optimizer, self.sparsifier, self.args)
        self.sparsifier.attach(optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """`Trainer.train`; a resumed run goes on from the checkpoint's sidecar."""
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            self._callback.resume_from = get_last_checkpoint(self.args.output_dir) if folder is True else folder
        return super().train(resume_from_checkpoint, *args, **options)


def _separate(optimizer: Optimizer, sparsifier: Sparsifier, args: Any) -> None:
    """Move the thresholds out of the groups that the Trainer made."""
    groups = sparsifier.param_groups(lr=args.learning_rate, weight_decay=args.weight_decay)
    wanted = next((group for group in groups if group["name"] == "thresholds"), None)
    if wanted is None:
        return
    thresholds = {id(parameter) for parameter in wanted["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in thresholds]
    known = optimizer.param_groups[0].keys()
    optimizer.add_param_group({key: value for key, value in wanted.items() if key == "params" or key in known})


class SparseSeq2SeqTrainer(SparseTrainer, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer`, made sparse by the arguments of `SparseTrainer`."""

"""FLOPs of sparse models and runs, by a paper's convention."""

from .conventions import CONVENTIONS, Convention, Passes
from .counting import LayerCost, layer_costs, layer_macs
from .fractions import TrainingMeter, forward_fraction, kept_counts, training_fraction, training_passes

__all__ = [
    "CONVENTIONS",
    "Convention",
    "LayerCost",
    "Passes",
    "TrainingMeter",
    "forward_fraction",
    "kept_counts",
    "layer_costs",
    "layer_macs",
    "training_fraction",
    "training_passes",
]

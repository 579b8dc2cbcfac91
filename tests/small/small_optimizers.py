"""Optimizers that people train with, those that keep state of other shapes than the weight's too."""

from __future__ import annotations

import torch
from small_runs import Optimizers
from transformers.optimization import Adafactor

OPTIMIZERS: Optimizers = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "sgd with decay": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adam with decay": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adafactor of torch": lambda groups: torch.optim.Adafactor(groups, lr=0.05),
    "adafactor of transformers": lambda groups: Adafactor(groups, lr=0.05, relative_step=False, beta1=0.9),
}

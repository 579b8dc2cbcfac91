"""The memory of a Transformer-XL between optimizer steps, saved with the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .segments import Segment

__all__ = ["SegmentMemory"]


class SegmentMemory:
    """What each chunk of columns remembers: per layer `[M, B, d]`, on the model's device.

    Calling it is the training loss of a segment: it hands the model the memory of the segment's chunk, none where a
    stream begins, and keeps what the model returns.
    """

    def __init__(self) -> None:
        self.chunks: dict[int, list[Tensor]] = {}

    def __call__(self, model: nn.Module, segment: Segment) -> Tensor:
        """Loss summed over the segment's tokens."""
        device = next(model.parameters()).device
        output = model(
            input_ids=segment.input_ids.to(device, non_blocking=True),
            target_ids=segment.target_ids.to(device, non_blocking=True),
            mems=None if segment.first else self.chunks[segment.chunk],
        )
        self.chunks[segment.chunk] = output.mems
        losses: Tensor = output.losses
        return losses.sum()

    def register(self, accelerator: Any) -> None:
        """Save and load with `accelerator.save_state` / `load_state`: every process has a memory of its own."""
        name = f"memory_{accelerator.process_index}.safetensors"

        def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{chunk}.{layer}": memory.contiguous().cpu()
                for chunk, memories in self.chunks.items()
                for layer, memory in enumerate(memories)
            }
            save_file(tensors, folder / name)

        def load(models: list[Any], input_dir: str) -> None:
            found = load_file(Path(input_dir) / name, device=str(accelerator.device))
            self.chunks = {}
            # By number: "10.0" sorts before "2.0".
            for key in sorted(found, key=lambda key: [int(part) for part in key.split(".")]):
                self.chunks.setdefault(int(key.split(".")[0]), []).append(found[key])

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

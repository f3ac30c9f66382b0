"""Checkpoints on disk: safetensors read and written as a stream, in output folders that appear whole or not at all."""

from .output import check_disk_space, check_output, note_outcome, output_folder, part_folder, take_outcome
from .reader import CheckpointReader, check_finite, is_finite
from .writer import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "check_disk_space",
    "check_finite",
    "check_output",
    "is_finite",
    "note_outcome",
    "output_folder",
    "part_folder",
    "take_outcome",
]

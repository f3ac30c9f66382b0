"""What stands beside a checkpoint when others are to use it."""

from .card import write_model_card

__all__ = ["write_model_card"]

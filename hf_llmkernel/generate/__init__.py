"""Text from a checkpoint: the `generate` command."""

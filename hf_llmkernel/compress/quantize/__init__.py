"""Integers in groups that share a scale."""

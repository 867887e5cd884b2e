"""Depth tasks: sequences generated from a seed and a position, whose answers need serial steps."""

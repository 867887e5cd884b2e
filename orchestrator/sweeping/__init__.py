"""Sweeps: their trials, what these cost, how they run, and which stop early."""

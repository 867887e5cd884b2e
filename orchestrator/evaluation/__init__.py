"""Measure models: lm-eval and held-out tasks, decoding time, memory; load models of any kind."""

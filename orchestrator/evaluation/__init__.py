"""Measure models: lm-eval and held-out tasks, latency, memory; load models of any kind."""

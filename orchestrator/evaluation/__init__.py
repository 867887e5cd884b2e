"""Measures models: lm-eval and held-out tasks, decoding time, memory; reads models of any kind."""

"""Sampling from policies with an autoscaling pool of vLLM engines, fed by Ray Data."""

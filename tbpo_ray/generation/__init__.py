"""Samples from policies: a pool of vLLM engines that grows and shrinks, fed by Ray Data."""

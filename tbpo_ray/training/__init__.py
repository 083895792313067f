"""The driver (Ray Train), the worker loop (DeepSpeed), checkpoints and reference scores."""

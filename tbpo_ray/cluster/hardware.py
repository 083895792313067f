"""Machines with GPUs that the repository's cluster files name, and the drivers that the locked CUDA needs.

Sources: the providers' pages of instance types; NVIDIA's CUDA release notes, table "CUDA Toolkit and
Corresponding Driver Versions".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuMachine:
    """A type of machine of a cloud provider, or the kind of node that a manifest asks for."""

    gpu: str
    gpus: int
    gib_per_gpu: float
    """Memory of a GPU that a process can use, GiB; less than its name says."""
    cpus: int
    host_gib: float


MACHINES = {
    "p4d.24xlarge": GpuMachine("A100-40GB", 8, 39.4, 96, 1152),
    "p4de.24xlarge": GpuMachine("A100-80GB", 8, 79.1, 96, 1152),
    "p5.48xlarge": GpuMachine("H100-80GB", 8, 79.1, 192, 2048),
    "p5en.48xlarge": GpuMachine("H200-141GB", 8, 139.8, 192, 2048),
    "g6.12xlarge": GpuMachine("L4", 4, 22.0, 48, 192),
    "g6e.12xlarge": GpuMachine("L40S", 4, 44.4, 48, 384),
    "g6e.48xlarge": GpuMachine("L40S", 8, 44.4, 192, 1536),
}
"""Amazon EC2 instance types by name."""
GKE_ACCELERATORS = {
    "nvidia-h100-80gb": GpuMachine("H100-80GB", 8, 79.1, 208, 1872),
    "nvidia-a100-80gb": GpuMachine("A100-80GB", 8, 79.1, 96, 1360),
    "nvidia-l4": GpuMachine("L4", 4, 22.0, 48, 192),
}
"""Values of the node label `cloud.google.com/gke-accelerator`, with the largest number of GPUs used here."""
CUDA_DRIVERS = {"12.8": (570, 26), "12.9": (575, 51), "13.0": (580, 65)}
"""CUDA runtime: the oldest Linux driver, major and minor version, that runs it."""
IMAGE_DRIVERS = {"base-oss-nvidia-driver-gpu-ubuntu-22.04": (580, 105)}
"""Families of AWS Deep Learning AMIs: the driver that their releases since December 2025 have at least."""

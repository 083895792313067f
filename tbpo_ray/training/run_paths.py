"""Where the files of a run are, for the processes that work on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tbpo_ray.storage.ownership import WriteLease


@dataclass(frozen=True)
class RunPaths:
    """Paths that a worker needs; all on storage that every node mounts."""

    run_dir: str
    checkpoints: str
    model: str
    """Folder or hub name of the policy that training starts from."""
    prepared: str
    """Folder of the prepared training pairs."""
    owner: str = ""
    """Token of the driver that holds the run."""
    prepared_eval: str | None = None
    reference: str | None = None
    """Folder of the frozen reference where it is loaded live and differs from the policy."""
    extra: list[str] = field(default_factory=list)
    """Folders whose columns extend the prepared pairs: reference scores, token weights."""
    extra_eval: list[str] = field(default_factory=list)

    @property
    def lease(self) -> WriteLease:
        """The driver's right to write into the run's folder, for the processes that work for it."""
        return WriteLease(self.run_dir, self.owner)

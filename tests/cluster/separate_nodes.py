"""Ray's fake node provider, with a temporary folder of its own for each node, as on machines of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class SeparateNodes(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        folder = Path(self.provider_config["folder"]) / f"n{self._next_node_id + 1}"
        parameters = partial(ray._private.parameter.RayParams, temp_dir=str(folder))
        with mock.patch.object(ray._private.parameter, "RayParams", parameters):
            super()._create_node_with_resources_and_labels(*arguments)

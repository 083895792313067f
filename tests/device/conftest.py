"""A second device for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device.second_device import SecondDevice


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    with SecondDevice() as active:
        yield active

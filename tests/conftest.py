"""Shared fixtures. Eight virtual CPU devices, so that sharded code is tested without any accelerator."""

from __future__ import annotations

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def eight_devices():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.devices()[:8]

"""The parity tier's environment has a torchvision whose operators a CPU torch does not bring.

Registering their fake kernels fails then, and with it the import; the pure Python parts (all that
timm and open_clip use of it) work once those registrations are left out.
"""

import os

import pytest
import torch

IS_PARITY = os.environ.get("SIGLIP2_PARITY") == "1"


def _without_torchvision(register_fake):
    def register(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    return register


if IS_PARITY:
    torch.library.register_fake = _without_torchvision(torch.library.register_fake)


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity_environment" in item.fixturenames and not IS_PARITY:
            reason = "needs the environment of tests/parity/make_venv.py and SIGLIP2_PARITY=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def parity_environment():
    """Tests that ask for it run in the parity tier only."""

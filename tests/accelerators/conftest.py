"""Programs for accelerators are compiled as users have them compiled."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "accelerators" in item.path.parts:
            item.add_marker(pytest.mark.optimized)

"""Cases that the tests of several kernels share."""

import pytest

_UNEVEN = {
    "none": (0.0, slice(None)),
    "first row": (1.0, slice(0, 1)),
    "last row": (1.0, slice(36, 37)),
    "ten rows": (0.5, slice(10, 20)),
}
some_outliers = pytest.mark.parametrize(
    ("density", "rows"), _UNEVEN.values(), ids=_UNEVEN.keys()
)
"""Shares of 37 rows' weights that are kept, and the rows that keep them."""
uneven_outliers = pytest.mark.parametrize(
    ("density", "rows"),
    [*_UNEVEN.values(), (1.0, slice(None))],
    ids=[*_UNEVEN.keys(), "all"],
)
"""The same, and all weights."""

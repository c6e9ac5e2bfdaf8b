"""Cases that the tests of several kernels share."""

import pytest

uneven_outliers = pytest.mark.parametrize(
    ("density", "rows"),
    [
        (0.0, slice(None)),
        (1.0, slice(None)),
        (1.0, slice(0, 1)),
        (1.0, slice(36, 37)),
        (0.5, slice(10, 20)),
    ],
    ids=["none", "all", "first row", "last row", "ten rows"],
)
"""Shares of 37 rows' weights that are kept, and the rows that keep them."""

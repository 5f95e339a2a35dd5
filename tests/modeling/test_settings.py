"""Settings and what holds in their place: for a call, in a context, in a thread."""

import pytest

from ailurus_hf.modeling.settings import resolve_num_groups


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "count", "expected"),
    [(1200, 0.5, None, 600), (1200, 0.25, None, 300), (5, 0.5, None, 3), (3, 0.01, None, 1), (9, 1, None, 9),
     (9, 0.5, 4, 4), (9, 0.5, 100, 9)],
)  # fmt: skip
def test_number_of_groups(num_tokens, ratio, count, expected):
    assert resolve_num_groups(num_tokens, ratio, count) == expected

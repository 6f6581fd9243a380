"""Budgets with units, and the largest batch within one."""

import pytest

from e3va_cli.errors import UserError
from e3va_cli.memory.budget import MAX_BATCH_SIZE, max_batch_size, parse_budget


@pytest.mark.parametrize(
    ("text", "mib"),
    [("11GiB", 11264), ("512 MiB", 512), ("8gb", 8e9 / 2**20), ("1.5GiB", 1536), ("1000MB", 1e9 / 2**20)],
)
def test_budgets_have_units(text, mib):
    assert parse_budget(text) == pytest.approx(mib)


@pytest.mark.parametrize("text", ["11", "11 apples", "GiB", "-3GiB", "0GiB", ""])
def test_invalid_budgets(text):
    with pytest.raises(UserError, match="11GiB"):
        parse_budget(text)


@pytest.mark.parametrize("limit", [50, 100, 149, 150, 1000, 1049, 1050, 3333, 10**9])
def test_max_batch_size_is_that_of_trying_all(limit):
    def line(batch):
        return 100 + 50 * (batch - 1)

    def bend(batch):  # another moment becomes the peak
        return max(100.0, 20.0 + 45 * batch)

    for peak in (line, bend):
        tried = []

        def asked(batch, peak=peak, tried=tried):
            tried.append(batch)
            return peak(batch)

        fitting = [b for b in range(1, MAX_BATCH_SIZE + 1) if peak(b) <= limit]
        assert max_batch_size(asked, limit) == max(fitting, default=0)
        assert len(tried) <= 6 and len(set(tried)) == len(tried)

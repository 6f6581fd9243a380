"""Group norm (arXiv 1803.08494) of as many groups as a width allows: one or two images suit no batch norm."""

from __future__ import annotations

from torch import nn

GROUPS = 32
CHANNELS_PER_GROUP = 8  # at least: of the two channels of a small group, a 1x1 map would keep no more than the order


def group_norm(channels: int) -> nn.GroupNorm:
    """A norm of maps with so many channels."""
    return nn.GroupNorm(num_groups(channels), channels)


def num_groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves no group less than 8 channels; else 1."""
    most = max(1, min(GROUPS, channels // CHANNELS_PER_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)

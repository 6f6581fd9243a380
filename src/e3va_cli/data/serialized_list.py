"""A list that forked workers share without copying."""

import pickle
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class SerializedList(Generic[Item]):
    """A read-only list of items pickled in one array, as detectron2's `TorchSerializedList`.

    Reading a Python object writes its reference count, so each DataLoader worker would in time copy every page of a
    list (https://github.com/pytorch/pytorch/issues/13246). An array stays shared.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        buffer = bytearray()
        ends = [0]
        for item in items:
            buffer += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            ends.append(len(buffer))
        self._bytes = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        item: Item = pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)
        return item

"""The processes of a run, and what they tell each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mtrain.errors import UserError

T = TypeVar("T")

# torch 2.13 renames them
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class World:
    """Collectives over all processes; with one process each is the identity.

    Rows of a batch are *dealt* by position: rank r holds the rows r, r + R, r + 2R, ...

    Attributes:
        sent: payload bytes by collective since the start: of the tensor that is reduced, gathered, scattered or sent.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # numbers that the host reads do not wait for the accelerator's queue
        self._host = dist.new_group(backend="gloo") if self.size > 1 and self.device.type != "cpu" else None
        self.sent: Counter[str] = Counter()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce, in place."""
        if self.size > 1:
            self.sent["all_reduce"] += tensor.nbytes
            dist.all_reduce(tensor)
        return tensor

    def sum_each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All-reduce several tensors of one type as one."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Sums over all ranks of a few numbers on the host."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        self.sent["control"] += values.nbytes
        dist.all_reduce(values, group=self._host)
        return values.tolist()

    def count_dealt(self, total: int) -> int:
        """Rows that this rank holds of so many that are dealt."""
        return max(0, -(-(total - self.rank) // self.size))

    def gather_dealt(self, x_BD: Tensor, total: int) -> Tensor:
        """All `total` rows, of which each rank holds those dealt to it."""
        if self.size == 1:
            return x_BD
        each = -(-total // self.size)
        own = x_BD.new_zeros(each, *x_BD.shape[1:])
        own[: len(x_BD)] = x_BD
        every = x_BD.new_empty(self.size * each, *x_BD.shape[1:])
        self.sent["all_gather"] += every.nbytes
        _ALL_GATHER(every, own)
        return every.view(self.size, each, *x_BD.shape[1:]).transpose(0, 1).flatten(0, 1)[:total]

    def scatter_dealt(self, x_GD: Tensor) -> Tensor:
        """Sum over ranks of `x_GD`, of which each rank gets the rows dealt to it (reduce-scatter)."""
        if self.size == 1:
            return x_GD
        each, shape = -(-len(x_GD) // self.size), x_GD.shape[1:]
        padded = x_GD.new_zeros(each * self.size, *shape)
        padded[: len(x_GD)] = x_GD
        by_rank = padded.view(each, self.size, *shape).transpose(0, 1).flatten(0, 1)
        own = x_GD.new_empty(each, *shape)
        self.sent["reduce_scatter"] += by_rank.nbytes
        _REDUCE_SCATTER(own, by_rank)
        return own[: self.count_dealt(len(x_GD))]

    def gather_rows(self, x_ND: Tensor) -> Tensor:
        """The rows of all ranks, one rank's after another's; how many each has need not be known."""
        if self.size == 1:
            return x_ND
        rows = self.gather_objects(len(x_ND))
        own = x_ND.new_zeros(max(rows), *x_ND.shape[1:])
        own[: len(x_ND)] = x_ND
        every = x_ND.new_empty(self.size * max(rows), *x_ND.shape[1:])
        self.sent["all_gather"] += every.nbytes
        _ALL_GATHER(every, own)
        by_rank = every.view(self.size, max(rows), *x_ND.shape[1:])
        return torch.cat([part[:count] for part, count in zip(by_rank, rows, strict=True)])

    def exchange(self, x_BD: Tensor, sent_R: Sequence[int], received_R: Sequence[int]) -> Tensor:
        """Send consecutive runs of rows, one to each rank, and get one from each (all-to-all)."""
        if self.size == 1:
            return x_BD
        out = x_BD.new_empty(sum(received_R), *x_BD.shape[1:])
        self.sent["all_to_all"] += x_BD.nbytes
        dist.all_to_all_single(out, x_BD.contiguous(), list(received_R), list(sent_R))
        return out

    def gather_objects(self, value: T) -> list[T]:
        """Each rank's value, on every rank."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self._host)
        return every

    def gather_to_first(self, value: T) -> list[T] | None:
        """Each rank's value, on rank 0."""
        if self.size == 1:
            return [value]
        every: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, every, dst=0, group=self._host)
        return every

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def together(self, function: Callable[[], T]) -> T:
        """The result of a function that every rank calls; a mistake that one of them finds ends all, and is said once.

        Raises:
            UserError: on rank 0, the first mistake found on any rank.
            SystemExit: on the others, with status 2.
        """
        error = result = None
        try:
            result = function()
        except UserError as found:
            error = str(found)
        errors = [text for text in self.gather_objects(error) if text is not None]
        if errors:
            if self.is_first:
                raise UserError(errors[0])
            raise SystemExit(2)
        return result  # type: ignore[return-value]


def count_gradients(model: DistributedDataParallel, sent: Counter[str]) -> None:
    """Add the payload bytes of the gradients that DDP all-reduces to `sent["gradients"]`, from now on."""

    def hook(state, bucket):  # torch refuses annotations that are strings, as those of this module
        sent["gradients"] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)

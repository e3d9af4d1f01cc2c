"""Training batches: the rows of step k are a pure function of the seed, k, and the cursors and sampler at its block's start.

A *stream* is what is read in an order of its own: a task (routed, files) or the whole part (grid, pairs). A *cursor* is the
number of rows that a stream has given so far, so it says epoch and position at once; nothing else needs to be saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.data.batch import Batch, Labels
from mtrain.data.inputs import Inputs
from mtrain.data.order import mix, name_key, shuffled
from mtrain.data.samplers import Sampler, draw
from mtrain.errors import UserError
from mtrain.parallel.shard import Deal, Shard
from mtrain.parallel.world import World

Ints = NDArray[np.int64]

BLOCK = 64  # steps whose counts are drawn together
ROWS = "rows"  # the stream of layouts whose rows are not drawn by task
WINDOW = 8  # chunks of that stream which are shuffled together
_SLAB_BYTES = 16e6  # inputs that are gathered at once
_AHEAD = 2  # slabs that wait for training
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Part:
    """Rows of one part of the split that have labels: `row_R` are rows of the inputs, `labels` go with them.

    `original` are the same labels in the user's units and float64, which metrics read: equal values must stay equal.
    """

    row_R: Tensor
    labels: Labels
    original: Labels | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_R)

    def of_tasks(self, own: Ints) -> Part:
        """The same rows with the labels of some tasks only, which are numbered anew."""
        return replace(self, labels=self.labels.of_tasks(own), original=self.original and self.original.of_tasks(own))

    def task_R(self) -> Ints:
        """Task of each row, where each has one label."""
        return self.labels.pairs().task_P.numpy()

    def batches(self, inputs: Inputs, size: int, shard: Shard, by_task: bool) -> Iterator[tuple[Batch, Labels | None]]:
        """Every row once, in storage order, with its original labels; on several ranks this rank's rows of each batch.

        Every rank gives as many batches, some of which may be empty. Rows that cannot be read have no labels.
        """
        part = self if shard.has_all else self.of_tasks(shard.own)
        task_R = self.task_R() if by_task else None

        def deals() -> Iterator[tuple[Deal, Ints]]:
            for start in range(0, self.num_rows, size):
                rows = min(size, self.num_rows - start)
                (deal,) = shard.deal(None if task_R is None else task_R[start : start + rows], rows)
                yield deal, deal.read + start

        made = ((deal, at_B, inputs.gather(self.row_R.numpy()[at_B])) for deal, at_B in deals())
        with Prefetched(made, 0 if inputs.in_memory else 1) as batches:
            for number, (deal, at_B, (x_BF, ok_B)) in enumerate(batches):
                at_H = at_B if deal.heads is None else deal.heads + number * size
                lost = at_B[:0]
                if ok_B is not None:
                    x_BF[torch.from_numpy(~ok_B)] = 0
                    lost = at_B[~ok_B]
                if deal.heads is not None and not inputs.in_memory:
                    lost = np.concatenate(shard.world.gather_objects(lost))
                labels, original = part.labels.take(torch.from_numpy(at_H)), part.original
                original = original and original.take(torch.from_numpy(at_H))
                if len(lost):
                    at_lost = np.flatnonzero(np.isin(at_H, lost))
                    labels, original = labels.without(at_lost), original and original.without(at_lost)
                row_H = None if deal.heads is None else self.row_R[torch.from_numpy(at_H)]
                task_B = None if task_R is None else torch.from_numpy(task_R[at_B])
                yield Batch(x_BF, self.row_R[torch.from_numpy(at_B)], labels, row_H, deal, task_B), original


class Streams:
    """Endless shuffled streams over the rows of a part.

    Each epoch of a stream takes its chunks in an order of its own, and the rows of each chunk (of `window` chunks that follow
    each other) in an order of its own. Both are pure functions of seed, name and epoch.

    Args:
        stream_R: stream of each row of the part.
        names: of the streams; they seed the orders.
        row_R: row of the inputs of each, ascending.
        chunk_R: chunk of each row.
        key_C: name of each chunk; streams that share chunks take them in the same order. Chunks of one name follow each
            other, as those of a text file must.
        by_task: each stream is a task.
    """

    def __init__(
        self,
        stream_R: Ints,
        names: Sequence[str],
        row_R: Ints,
        chunk_R: Ints,
        key_C: NDArray[np.uint64],
        seed: int,
        window: int = 1,
        by_task: bool = True,
    ):
        self.names, self.seed, self.window, self.stream_R, self.by_task = list(names), seed, window, stream_R, by_task
        self.rows_S = np.bincount(stream_R, minlength=len(names))
        self.start_S = np.cumsum(self.rows_S) - self.rows_S
        self.at_R = np.lexsort((chunk_R, stream_R))
        self.key_S = np.array([name_key(name) for name in names], dtype=np.uint64)
        stream, chunk = stream_R[self.at_R], chunk_R[self.at_R]
        new = np.ones(len(stream), dtype=bool)
        new[1:] = (stream[1:] != stream[:-1]) | (chunk[1:] != chunk[:-1])
        self.start_G = np.flatnonzero(new)  # G segments: the rows of a stream in one chunk
        self.size_G = np.diff(self.start_G, append=len(stream))
        self.key_G = key_C[chunk[self.start_G]]
        self.segments_S = np.bincount(stream[self.start_G], minlength=len(names))
        self.first_S = np.cumsum(self.segments_S) - self.segments_S
        self._orders: dict[int, tuple[int, Ints, Ints]] = {}
        first = row_R[self.at_R[np.minimum(self.start_S, len(row_R) - 1)]]
        local_R = row_R[self.at_R] - np.repeat(first, self.rows_S)
        which_S = np.zeros(len(names), dtype=np.uint64)
        np.add.at(which_S, stream, mix(local_R.astype(np.uint64) + np.uint64(1)))
        self.identity = list(zip(self.rows_S.tolist(), which_S.tolist(), strict=True))
        """For each stream its number of rows, and a number that changes with which of its rows they are."""

    def rows(self, stream_P: Ints, position_P: Ints) -> Ints:
        """Rows of the part at positions of streams."""
        key_P, size_P, place_P = self.key_S[stream_P], self.rows_S[stream_P], position_P
        several = np.flatnonzero(self.segments_S[stream_P] > 1)
        if len(several):
            epoch = place_P[several] // size_P[several]
            orders = self._orders_of(stream_P[several], epoch)
            target = orders.begin + place_P[several] - epoch * size_P[several]
            first, last = orders.pool(orders.segment(target), self.window)
            begin = orders.end[first] - self.size_G[orders.order[first]]
            size = orders.end[last] - begin
            key_P, size_P, place_P = key_P.copy(), size_P.copy(), place_P.copy()
            key_P[several] = mix(key_P[several] + self.key_G[orders.order[first]] + (first - orders.first).astype(np.uint64))
            size_P[several], place_P[several] = size, epoch * size + target - begin
        at_P = shuffled(self.seed, key_P, place_P, size_P)
        if len(several):
            target = begin + at_P[several]
            segment = orders.segment(target)
            own = orders.order[segment]
            at_P[several] = (
                self.start_G[own] + target - (orders.end[segment] - self.size_G[own]) - self.start_S[stream_P[several]]
            )
        return self.at_R[self.start_S[stream_P] + at_P]

    def _orders_of(self, stream_P: Ints, epoch_P: Ints) -> _Orders:
        """The orders of some streams in some epochs, one after another."""
        both, group_P = np.unique(np.stack([stream_P, epoch_P]), axis=1, return_inverse=True)
        found = [self._order(stream, epoch) for stream, epoch in both.T.tolist()]
        base = np.cumsum([0, *(end_G[-1] for _, end_G in found)])
        first = np.cumsum([0, *(len(order_G) for order_G, _ in found)])
        group_P = group_P.ravel()
        return _Orders(
            order=np.concatenate([order_G for order_G, _ in found]),
            end=np.concatenate([end_G + begin for (_, end_G), begin in zip(found, base, strict=False)]),
            begin=base[group_P],
            first=first[group_P],
            stop=first[group_P + 1],
        )

    def _order(self, stream: int, epoch: int) -> tuple[Ints, Ints]:
        """The segments of a stream in the order of an epoch, and the position at which each ends."""
        known = self._orders.get(stream)
        if known is None or known[0] != epoch:
            own = self.first_S[stream] + np.arange(self.segments_S[stream])
            draw = mix(np.array([epoch, self.seed % 2**64], dtype=np.uint64))
            order_G = own[np.argsort(mix(self.key_G[own] ^ draw[0] ^ mix(draw[1:])), kind="stable")]
            known = self._orders[stream] = epoch, order_G, np.cumsum(self.size_G[order_G])
        return known[1], known[2]


@dataclass(frozen=True)
class _Orders:
    """Segments of several streams in order, with where each ends if the streams are laid end to end; and for each of P
    positions where its stream begins, and the first segment of its stream and of the next."""

    order: Ints
    end: Ints
    begin: Ints
    first: Ints
    stop: Ints

    def segment(self, target_P: Ints) -> Ints:
        return np.searchsorted(self.end, target_P, side="right")

    def pool(self, segment_P: Ints, window: int) -> tuple[Ints, Ints]:
        """The first and last of the segments that are shuffled with each."""
        first = self.first + (segment_P - self.first) // window * window
        return first, np.minimum(first + window, self.stop) - 1


@dataclass(frozen=True)
class Slab:
    """Batches of some steps, the rows that each stream gave for each, and what the sampler is after each; or no batches, and
    the streams that could not be read, with the step of their first such row."""

    batches: list[list[Batch]]
    count_KS: Ints
    sampler_states: list[dict[str, Any]]
    lost_rows: Ints
    failed: dict[str, int]

    def without(self, lost_rows: Ints) -> Slab:
        """With no labels for rows whose inputs cannot be used."""
        return replace(self, batches=[[_without(batch, lost_rows) for batch in micro] for micro in self.batches])


def _without(batch: Batch, lost_rows: Ints) -> Batch:
    row_H = (batch.row_B if batch.row_H is None else batch.row_H).numpy()
    at_H = np.flatnonzero(np.isin(row_H, lost_rows)) if len(lost_rows) else lost_rows
    return replace(batch, labels=batch.labels.without(at_H)) if len(at_H) else batch


class Loader:
    """Batches of training steps, in order.

    The counts of a step are systematic samples of the probabilities, not multinomial draws: B equidistant points
    with a low-discrepancy offset fall into the streams' shares of [0, 1), so a stream's rows per step differ by at most
    one, and over many steps its share is met almost exactly. Streams are laid out anew for each block of steps.

    Args:
        shard: which rows of a batch this rank reads, and which its heads read; None: all of both. Every rank knows the cursors
            of all streams.
        micro_batches: of a step.
        device: where inputs go ahead of training.
        skip_changed: a task whose training rows are not those of the checkpoint is left out, instead of an error.
    """

    def __init__(
        self,
        inputs: Inputs,
        part: Part,
        streams: Streams,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        *,
        shard: Shard | None = None,
        micro_batches: int = 1,
        device: torch.device | None = None,
        skip_changed: bool = False,
    ):
        self.inputs, self.part, self.streams, self.sampler = inputs, part, streams, sampler
        self.batch_size, self.seed = batch_size, seed
        self.shard = shard = shard or Shard.replicated(World(), [str(t) for t in range(part.labels.num_tasks)])
        self.micro_batches, self.device, self.skip_changed = micro_batches, device, skip_changed
        self.labels = part.labels if shard.has_all else part.labels.of_tasks(shard.own)
        self.steps_per_epoch = -(-part.num_rows // batch_size)
        self.cursor_S = np.zeros(len(streams.names), dtype=np.int64)
        self.dropped: dict[str, int] = {}
        """Streams that could not be read, and the step from which on they are left out."""
        self._sampler_state = self._state_of_sampler()
        self._ahead: Prefetched[Slab] | None = None
        self._slab: Slab | None = None
        self._next = (-1, 0)  # step, and its place in the slab

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of a step; on several ranks, this rank's rows of them."""
        if self._ahead is None or self._next[0] != step:
            self._read_from(step)
        while self._slab is None or self._next[1] == len(self._slab.batches):
            assert self._ahead is not None
            slab = next(self._ahead)
            if not self.inputs.in_memory:  # what one rank cannot use, all leave out
                every = self.shard.world.gather_objects((slab.failed, slab.lost_rows))
                failed = [of_rank for of_rank, _ in every]
                if any(failed):
                    names = sorted(set().union(*failed))
                    self.dropped |= {name: min(one[name] for one in failed if name in one) for name in names}
                    self._read_from(step)
                    continue
                slab = slab.without(np.concatenate([lost_rows for _, lost_rows in every]))
            self._slab, self._next = slab, (step, 0)
        slab, place = self._slab, self._next[1]
        self.cursor_S += slab.count_KS[place]
        self._sampler_state = slab.sampler_states[place]
        self._next = step + 1, place + 1
        return slab.batches[place]

    def _read_from(self, step: int) -> None:
        """Begin to read ahead at a step."""
        self.close()
        self._restore_sampler(self._sampler_state)
        made = self._slabs(step, self.cursor_S.copy(), dict(self.dropped))
        self._ahead, self._slab, self._next = Prefetched(made, 0 if self.inputs.in_memory else _AHEAD), None, (step, 0)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands after the last batch: plain numbers by the streams' names."""
        names = self.streams.names
        return {
            "cursors": dict(zip(names, self.cursor_S.tolist(), strict=True)),
            "rows": dict(zip(names, self.streams.identity, strict=True)),
            "sampler": self._sampler_state,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: dict[str, Any], same_tasks: bool = True) -> bool:
        """Continue where `state` was taken. Tasks that are new since then begin; of those that are gone nothing stays.

        With other tasks than before (`same_tasks` is false) rows may have moved in the table, and in a stream of all rows other
        ones have labels; returns whether its epoch begins anew for that.

        Raises:
            UserError: a task that it knows, or with the same tasks the table, has other training rows now.
        """
        names, dropped, cursors = self.streams.names, dict(state["dropped"]), dict(state["cursors"])
        anew = False
        for name, identity in zip(names, self.streams.identity, strict=True):
            if name not in cursors or list(identity) == list(state["rows"][name]) or name in dropped:
                continue
            rows, before = identity[0], state["rows"][name][0]
            if not self.streams.by_task and not same_tasks:
                cursors[name], anew = cursors[name] // before * rows, True
                continue
            if not same_tasks and rows == before:
                continue
            if self.skip_changed:
                dropped[name] = 0
                continue
            of = f"task '{name}'" if self.streams.by_task else "the table"
            now = f"{rows} training rows now, had {before}" if rows != before else "other training rows now than"
            raise UserError(
                f"checkpoint: {of} has {now} when it was written: the data have changed; bring them back, or start a new "
                "run with another --run_dir"
            )
        self.close()
        self.cursor_S = np.array([cursors.get(name, 0) for name in names], dtype=np.int64)
        self.dropped, self._sampler_state = dropped, state["sampler"]
        return anew

    def counts(self, first: int, dropped: dict[str, int]) -> Ints:
        """Rows of each stream in the steps `first` to the end of its block, `[K, S]`; draws the sampler's probabilities."""
        names, rows_S = self.streams.names, self.streams.rows_S
        number = first // BLOCK
        start = number * BLOCK
        out = [s for s, name in enumerate(names) if dropped.get(name, first) < start] if dropped else []
        rows_S = rows_S.copy()
        rows_S[out] = 0
        probability_S = draw(self.sampler, rows_S)
        block_key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) + np.uint64(number))
        layout = np.argsort(mix(self.streams.key_S ^ block_key), kind="stable")  # by name: not by the order of the task table
        edges = np.cumsum(probability_S[layout])
        edges[edges >= edges[-1]] = np.inf  # rounding must not draw a stream of probability 0 behind the last
        offset_K = (np.arange(first, start + BLOCK) * _GOLDEN + np.random.default_rng(self.seed).random()) % 1.0
        point_KB = (np.arange(self.batch_size) + offset_K[:, None]) / self.batch_size
        stream_KB = layout[np.searchsorted(edges, point_KB, side="right")]
        flat = stream_KB + np.arange(len(offset_K))[:, None] * len(names)
        return np.bincount(flat.ravel(), minlength=len(offset_K) * len(names)).reshape(len(offset_K), len(names))

    def _slabs(self, step: int, cursor_S: Ints, dropped: dict[str, int]) -> Iterator[Slab]:
        """Endless slabs from a step on, the first ones short; the sampler stands at the start of the step's block."""
        most = 1 if self.inputs.in_memory else min(BLOCK, int(_SLAB_BYTES / (4 * self.inputs.width * self.batch_size)) + 1)
        size = 1
        while True:
            before = self._state_of_sampler()
            count_KS = self.counts(step, dropped)
            after = self._state_of_sampler()
            first, end = step, step + len(count_KS)
            self._leave_out(dropped, count_KS, first)
            rows = self._rows(count_KS, cursor_S)
            while step < end:
                stop = min(step + size, end)
                place = slice(step - first, stop - first)
                batches, lost_rows, failed = self._batches(rows[place], step)
                states = [before] * (stop - step - 1) + [after if stop == end else before]
                yield Slab(batches, count_KS[place], states, lost_rows, failed)
                step, size = stop, min(4 * size, most)
            cursor_S = cursor_S + count_KS.sum(0)

    def _leave_out(self, dropped: dict[str, int], count_KS: Ints, first: int) -> None:
        for s, name in enumerate(self.streams.names if dropped else []):
            if name in dropped:
                count_KS[max(0, dropped[name] - first) :, s] = 0

    def _rows(self, count_KS: Ints, cursor_S: Ints) -> list[tuple[Ints, Ints]]:
        """Rows of the part for each step, sorted by stream, and the stream of each."""
        step_A, stream_A = np.nonzero(count_KS)
        count_A = count_KS[step_A, stream_A]
        first_A = (cursor_S + np.cumsum(count_KS, axis=0) - count_KS)[step_A, stream_A]
        within_P = np.arange(count_A.sum()) - np.repeat(np.cumsum(count_A) - count_A, count_A)
        stream_P = np.repeat(stream_A, count_A)
        at_P = self.streams.rows(stream_P, np.repeat(first_A, count_A) + within_P)
        ends = np.cumsum(count_KS.sum(1))[:-1]
        return list(zip(np.split(at_P, ends), np.split(stream_P, ends), strict=True))

    def _batches(self, rows: list[tuple[Ints, Ints]], step: int) -> tuple[list[list[Batch]], Ints, dict[str, int]]:
        """Batches of consecutive steps, and rows whose inputs cannot be used; or none, where a row cannot be read: then its
        stream, and its step."""
        deals = [
            (at_P, deal)
            for at_P, stream_P in rows
            for deal in self.shard.deal(stream_P if self.streams.by_task else None, len(at_P), self.micro_batches)
        ]
        read = [at_P[deal.read] for at_P, deal in deals]
        at_P = np.concatenate(read)
        row_P = self.part.row_R.numpy()[at_P]
        x_PF, ok_P = self.inputs.gather(row_P)
        lost_rows = row_P[:0]
        if ok_P is not None:
            lost = np.flatnonzero(~ok_P & np.isin(self.inputs.chunk_N[row_P], self.inputs.failed()))[::-1]
            if len(lost):
                step_P = np.repeat(np.arange(len(read)) // self.micro_batches + step, [len(at_B) for at_B in read])
                names = self.streams.names
                found = zip(self.streams.stream_R[at_P[lost]].tolist(), step_P[lost].tolist(), strict=True)
                return [], lost_rows, {names[s]: k for s, k in found}  # backwards: the first step stays
            x_PF[torch.from_numpy(~ok_P)] = 0
            lost_rows = row_P[~ok_P]
        if self.device is not None and self.device.type == "cuda":
            x_PF = x_PF.pin_memory().to(self.device, non_blocking=True)
        heads = [at_B if deal.heads is None else at_P[deal.heads] for at_B, (at_P, deal) in zip(read, deals, strict=True)]
        row_R, sizes = self.part.row_R, [len(at_B) for at_B in read]
        taken = self.labels.take(torch.from_numpy(np.concatenate(heads)))
        labels: Sequence[Labels] = taken.split([len(at_H) for at_H in heads])
        x, row = x_PF.split(sizes), row_R[torch.from_numpy(at_P)].split(sizes)
        task: Sequence[Tensor | None] = [None] * len(sizes)
        if self.streams.by_task:
            task = torch.from_numpy(self.streams.stream_R[at_P]).split(sizes)
        made = [
            Batch(x_BF, row_B, of_heads, None if deal.heads is None else row_R[torch.from_numpy(at_H)], deal, task_B)
            for x_BF, row_B, of_heads, at_H, (_, deal), task_B in zip(x, row, labels, heads, deals, task, strict=True)
        ]
        return [made[i : i + self.micro_batches] for i in range(0, len(made), self.micro_batches)], lost_rows, {}

    def _state_of_sampler(self) -> dict[str, Any]:
        return self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else {}

    def _restore_sampler(self, state: dict[str, Any]) -> None:
        if hasattr(self.sampler, "load_state_dict"):
            self.sampler.load_state_dict(state)


T = TypeVar("T")


class Prefetched(Iterator[T]):
    """An iterator that runs `ahead` items before its user, in a thread; 0: in the user's own. Errors reach the user.

    A context manager; `close` waits for the item in work.
    """

    def __init__(self, items: Iterator[T], ahead: int):
        self.items = items
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mtrain-data") if ahead else None
        self.made: deque[Future[T]] = deque()
        for _ in range(ahead):
            self._make()

    def __next__(self) -> T:
        if self.pool is None:
            return next(self.items)
        if not self.made:
            raise StopIteration
        item = self.made.popleft().result()
        self._make()
        return item

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.made.clear()

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        assert self.pool is not None
        self.made.append(self.pool.submit(next, self.items))


def build_streams(part: Part, inputs: Inputs, names: Sequence[str] | None, seed: int) -> Streams:
    """The streams of a part: one for each task, or (no names) one of all rows."""
    row_R = part.row_R.numpy()
    of_chunks = row_R, inputs.chunk_N[row_R], inputs.key_C, seed
    if names is None:
        return Streams(np.zeros(part.num_rows, dtype=np.int64), [ROWS], *of_chunks, WINDOW, by_task=False)
    return Streams(part.task_R(), names, *of_chunks)

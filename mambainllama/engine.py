"""The engine of `mambainllama serve`: one thread that owns the models and their States, and a bounded queue into it. No HTTP here.

It is generate's Table, kept going: rows are seated as others leave, long prompts are read in parts between rounds, and what a row gets is
what `mil.generate` gives for its prompt, seed and index.

Beginnings of prompts are kept as States, in spare slots of the Table, to be copied instead of read again. Which ones is a matter of bits:
a State that stands at a multiple of part_size is the one that any prompt with this beginning passes through; any other is the State of one
whole prompt, and serves the same prompt alone. So a hit changes no token, greedy or sampled."""
import threading
from collections import OrderedDict, deque
from math import ceil
from time import perf_counter

import numpy as np

from .config import is_dynamic
from .generate import Row, Table, lookahead_of, part_size
from .model import State

SEATS = 32  # rows decoded side by side, as far as they fit into
ROW_BYTES = {"cpu": 4 << 30, "cuda": 32 << 30}  # bytes; at least 4 rows
CONTEXT = 4096  # tokens of a row, where the model takes as many
LEAST = 16      # tokens; fewer are read as fast as copied
MOST_KEPT = 128  # States


class Full(Exception):
    """The queue has no room for a request now; `seconds` is when it may."""

    def __init__(self, seconds):
        super().__init__(f"rate limit: the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Draining(Exception):
    """The engine finishes what it has and takes nothing new."""


class Request:
    """Rows that came together. notify(news) is called from the engine's thread with a list of (row, text), text None for the end of a row:
    live, after each round, of what became certain in it; else of the ends alone, when all rows have theirs. Or with an Exception, after
    which nothing comes. cancel: its rows leave at the next round."""

    def __init__(self, notify, live=True):
        self.notify, self.live, self.rows, self.news, self.cancelled = notify, live, [], [], False
        self.open = 0  # rows that have not ended

    def row(self, engine, ids, max_new_tokens, stop, logprobs, echo, choice, seed):
        """Adds a continuation of `ids`; arguments as generate's, and checked: choice has a value for each of its CHOICES."""
        model = engine.model
        row = Row(len(self.rows), ids, max_new_tokens, model.tokenizer, stop, engine.ends, logprobs,
                  self._more if self.live else None, None, choice, seed, echo and logprobs is not None)
        row.request, row.cached, row.done = self, 0, self._done
        self.rows.append(row)
        self.open += 1
        if row.finished:  # already: nothing was asked for
            self._done(row.place, row.out)

    def _more(self, place, token, text):
        if place < len(self.rows) and (text or token is not None and self.rows[place].tokenizer is None):
            self.news.append((self.rows[place], text))

    def _done(self, place, completion):
        self.open -= 1
        self.news.append((self.rows[place], None))

    def flush(self):
        if self.news and (self.live or self.open == 0):
            news, self.news = self.news, []
            self.notify(news)

    def cancel(self):
        self.cancelled = True


class Engine:
    """rows, context (tokens of a row, prompt and answer), cache (bytes of kept States), queue (rows that may wait): None for the defaults.
    counts: a dict of what has happened so far.  draining: set it, and nothing new is taken.
    ValueError, one sentence: a draft of another vocabulary, a size below 1."""

    def __init__(self, model, draft=None, lookahead=4, rows=None, context=None, cache=1 << 30, queue=1024):
        longest = model.config.get("max_position_embeddings") or CONTEXT
        context = min(longest, CONTEXT) if context is None else context
        for name, value in (("rows", rows), ("context", context), ("queue", queue)):
            if value is not None and value < 1:
                raise ValueError(f"serve: {name} must be 1 or more, not {value}")
        if cache < 0:
            raise ValueError(f"serve: cache must be 0 or more, not {cache}")
        lookahead = lookahead_of(model, draft, lookahead)
        self.model, self.draft, self.context, self.queue = model, draft, context, queue
        self.ends = frozenset(model.stop_tokens)
        self.row_bytes = sum(State(m, 1, context + lookahead + 1).row_bytes for m in ([model, draft] if lookahead else [model]))
        rows = min(SEATS, max(4, ROW_BYTES[model.device] // self.row_bytes)) if rows is None else rows
        spare = min(cache // self.row_bytes, MOST_KEPT)
        if is_dynamic(model.config, model.mamba_config):  # its frequencies are those of the longest row: one at a time
            rows, spare = 1, 0
        self.table = Table(model, draft, lookahead, rows, context, spare)
        self.prefixes = _Prefixes(part_size(model), range(rows, rows + spare))
        self.counts = dict.fromkeys(("rows", "prompt_tokens", "cached_tokens", "new_tokens", "cache_hits", "cache_misses", "cancelled"), 0)
        self.waiting = deque()
        self._reading = None  # the slot whose prompt is being read
        self._seconds = 1.0  # that a row takes, a moving average
        self._wake, self.draining, self._stopping = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from other threads --------------------------------------------------------------------------------------------------------------

    def submit(self, request):
        """Takes all rows of a request or none. Raises Full or Draining."""
        rows = [row for row in request.rows if not row.finished]
        with self._wake:
            if self.draining:
                raise Draining
            if len(self.waiting) + len(rows) > self.queue + sum(seat is None for seat in self.table.seats):
                raise Full(min(60, max(1, ceil(self._seconds * len(self.waiting) / len(self.table.seats)))))
            for row in rows:
                row.arrived = perf_counter()
            self.waiting.extend(rows)
            self._wake.notify()
        if not rows:
            request.flush()

    @property
    def idle(self):
        return not self.waiting and not self.rows_in_use

    @property
    def rows_in_use(self):
        return sum(row is not None for row in self.table.seats)

    def stop(self):
        """Ends the thread after the round that runs; what it had is told so."""
        with self._wake:
            self.draining = self._stopping = True
            self._wake.notify()
        self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------------------------------

    def _run(self):
        while True:
            with self._wake:
                while self.idle and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._leave()
                self._read()
                done = self.table.round()
                for row in done:
                    self._left(row)
                for request in {row.request for row in [*self.table.seats, *done] if row}:
                    request.flush()
            except Exception as error:  # the device failed: those in seats cannot go on, others may
                with self._wake:
                    self._fail(error, everyone=not self.rows_in_use)
        with self._wake:
            self._fail(Draining("the server is stopping"), everyone=True)

    def _fail(self, error, everyone=False):
        failed = {row.request for row in self.table.seats if row} | ({row.request for row in self.waiting} if everyone else set())
        self.table.seats[:] = [None] * len(self.table.seats)
        self._reading = None
        self.prefixes.clear()
        if everyone:
            self.waiting.clear()
        for request in failed:
            request.cancel()
            request.notify(error)

    def _leave(self):
        """Rows whose client is gone leave their seats, and the queue."""
        for slot, row in enumerate(self.table.seats):
            if row and row.request.cancelled:
                self.table.seats[slot] = None
                self.counts["cancelled"] += 1
                if slot == self._reading:
                    self._reading = None
        with self._wake:
            gone = [row for row in self.waiting if row.request.cancelled]
            if gone:
                self.waiting = deque(row for row in self.waiting if not row.request.cancelled)
                self.counts["cancelled"] += len(gone)

    def _read(self):
        """Reads prompts, first come first served, until about part_size tokens are read or all seats are taken."""
        table, left = self.table, part_size(self.model)
        while left > 0:
            if self._reading is None and not self._seat():
                return
            slot = self._reading
            row, before = table.seats[slot], table.seats[slot].read
            whole = table.read(slot)
            left -= max(row.read - before, 1)
            self.prefixes.keep(table, slot)
            if whole:
                self._reading = None
                if not row.room:  # nothing to add to what is echoed
                    table.seats[slot] = None
                    row.finish("length")
                    self._left(row)
                    row.request.flush()

    def _seat(self):
        """Seats the next row; -> whether there is one and a seat for it."""
        if not self.waiting or None not in self.table.seats:
            return False
        slot = self.table.seats.index(None)
        with self._wake:
            row = self.waiting[0]
        source, n = (None, 0) if row.echo else self.prefixes.find(row)  # the echo needs the logits of what it reads
        self.table.seat(slot, row, source, n)
        with self._wake:  # now only: idle sees it in one of the two
            self.waiting.popleft()
        self._reading, row.cached = slot, n
        self.counts["cache_hits" if n else "cache_misses"] += 1
        self.counts["cached_tokens"] += n
        self.counts["prompt_tokens"] += row.prompt
        return True

    def _left(self, row):
        self.counts["rows"] += 1
        self.counts["new_tokens"] += len(row.out.tokens)
        self._seconds += 0.1 * (perf_counter() - row.arrived - self._seconds)


class _Prefixes:
    """States of prompts' beginnings, each in a slot; the one that was used longest ago makes room. All take the same memory."""

    def __init__(self, part, slots):
        self.part, self.free = part, list(slots)
        self.kept = OrderedDict()  # ids as bytes: slot
        self.seen = OrderedDict()  # hashes of beginnings that were read

    def clear(self):
        self.free += self.kept.values()
        self.kept.clear()

    def find(self, row):
        """(slot, tokens) of the longest beginning of the row's prompt that is kept, (None, 0) without."""
        n = row.prompt - 1
        ids = _key(row.ids[:n])
        for length in [n, *range(n // self.part * self.part, 0, -self.part)]:
            slot = self.kept.get(ids[:4 * length])
            if slot is not None:
                self.kept.move_to_end(ids[:4 * length])
                return slot, length
        return None, 0

    def keep(self, table, slot):
        """Keeps what `slot` has read so far if it is likely to be asked for: the whole prompt (the same again, n > 1), its last whole part
        (the chat goes on) or a beginning that was met before (a system message, examples)."""
        row = table.seats[slot]
        n, length = row.prompt - 1, row.read
        if length < LEAST or not (self.free or self.kept):
            return
        key = _key(row.ids[:length])
        seen = hash(key) in self.seen
        self.seen[hash(key)] = None
        self.seen.move_to_end(hash(key))
        if len(self.seen) > 1 << 16:
            self.seen.popitem(last=False)
        if key in self.kept:
            self.kept.move_to_end(key)
        elif seen or length + self.part > n:
            to = self.free.pop() if self.free else self.kept.popitem(last=False)[1]
            for state in table.states:
                state.copy(to, slot)
            self.kept[key] = to


def _key(ids):
    return np.array(ids, np.int32).tobytes()

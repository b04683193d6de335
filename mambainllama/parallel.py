"""Data parallel training: the ranks of a job that mpirun started, and what they tell each other.

The rows of a step are dealt out to the ranks, and each computes the gradients of its own. A reduce-scatter gives each rank the sum of one of
equal parts of the gradient arena; it moves the weights of that part, whose moments and float32 master weights it alone keeps; and an
all-gather gives them to the others, in the dtype that they are stored in (ZeRO's first stage, Rajbhandari et al. 2020, arXiv 1910.02054).
On a CPU MPI does both, between GPUs NCCL, in the order of the model's own stream. Gradients in bf16 lie before the others and are shared out
likewise; MPI adds them in float32, NCCL in bf16.

What ranks tell each other goes through every(), and every exchange of arrays begins with one: there a rank that has failed says so instead,
and all raise. A rank that is lost, killed or crashed, is mpirun's to see: it ends the job."""
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from .config import said
from .weights import rounded, widened

LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", "SLURM_NTASKS"))
KINDS = (ValueError, OSError, MemoryError, KeyboardInterrupt, RuntimeError)  # of errors, as all ranks raise them


def started():
    """(rank, number of ranks), as mpirun or srun says; (0, 1): this process is one by itself."""
    for rank, size in LAUNCHERS:
        if rank in os.environ and int(os.environ.get(size, 1)) > 1:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


@cache
def ranks():
    """This process's Ranks, made at the first call: it takes its share of the machine's threads and one of its GPUs. ValueError: no mpi4py."""
    _, size = started()
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpirun started {size} processes, and mpi4py cannot be used ({said(error)}): pip install 'mambainllama[mpi]'") from None
    if MPI.COMM_WORLD.size != size:
        raise ValueError(f"mpirun started {size} processes, and mpi4py's MPI sees {MPI.COMM_WORLD.size}: it is another one than mpirun's "
                         f"({MPI.Get_library_version().split(',')[0].strip()})")
    neighbours = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)  # on this machine
    cpus = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("MIL_NUM_THREADS", str(max(1, len(cpus) // neighbours.allgather(cpus).count(cpus))))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))] if given is None else given.split(",")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[neighbours.rank % len(gpus)]  # which CUDA reads at its first call
    return Ranks(MPI)


def lost(out=None):
    """What a job says that ended early; the same command goes on from `out`."""
    return "mambainllama: the job ended early, a rank lost or killed" + (f"; the same command goes on from {out}" if out is not None else "")


class Ranks:
    """The ranks of the job, seen from one of them; without MPI, the only one. first: the one that writes and speaks."""

    def __init__(self, mpi=None):
        self.mpi, self.comm = mpi, mpi and mpi.COMM_WORLD
        self.rank, self.size = (self.comm.rank, self.comm.size) if mpi else (0, 1)
        self.first = self.rank == 0

    @contextmanager
    def job(self, lost=None):
        """What the ranks do together: an error of one is raised by all. lost: what is said if the job ends with neither an error nor the end
        of the block, since a rank was killed."""
        watch = None
        if lost and self.first and self.size > 1:  # a process of its own, which outlives us: mpirun kills the ranks that are left
            watch = subprocess.Popen(["sh", "-c", 'read -r word || echo "$0" >&2', lost], stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield
            self.every(None)
        except BaseException as error:
            if self.size > 1 and not getattr(error, "told", False):
                kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
                error.told = True
                self.comm.allgather((None, (kind, said(error))))
            raise
        finally:
            if watch:
                watch.communicate(b"end\n")

    def every(self, value):
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        found = self.comm.allgather((value, None))
        for rank, (_, failure) in enumerate(found):
            if failure:
                error = failure[0](f"rank {rank}: {failure[1]}")
                error.told = True
                raise error
        return [value for value, _ in found]

    def same(self, value, sentence):
        """ValueError, "rank 1 …" with the sentence, if a rank's value is not the first one's."""
        found = self.every(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"rank {rank} {sentence}")

    def in_turn(self, work):
        """What work() returns: the first rank does it, then the others, who find what it has kept, such as the data's tokens."""
        found = work() if self.first else None
        self.every(None)
        return found if self.first else work()

    def part(self, things):
        """Those of an iterable that this rank is dealt."""
        return islice(things, self.rank, None, self.size)

    def whole(self, found):
        """What all ranks found for the things that part gave them, one list, in the things' order."""
        found = self.every(found)
        return [found[i % self.size][i // self.size] for i in range(sum(map(len, found)))]

    def sum(self, values):
        """The sums over all ranks of a dict of numbers; a key that a rank lacks is 0 there."""
        found = self.every(values)
        return {key: sum(one.get(key, 0) for one in found) for key in dict.fromkeys(key for one in found for key in one)}

    # -- a model's arena -----------------------------------------------------------------------------------------------------

    def share(self, model):
        """The model's optimiser keeps and moves this rank's part alone from now on."""
        model.c.share(self.rank, self.size)

    def reduce(self, model):
        """This rank's part of the gradients becomes the sum over all ranks; the rest is lost. A rank that has computed none adds zeros."""
        if self.size == 1:
            return
        address, halves, floats, stream = model.c.arena()
        arena = None if self._nccl(model) else model.c.arena_get()
        self.every(None)
        for first, count, width in ((0, halves, 2), (2 * halves, floats, 4)):
            part = count // self.size
            own = first + width * part * self.rank
            if not count:
                continue
            if arena is None:
                self.bindings.reduce_scatter(address + first, address + own, part, self.core.BFLOAT16 if width == 2 else self.core.FLOAT32,
                                             self.core.SUM, self.bindings.Comm(self.nccl.ptr), stream)
                continue
            whole, total = arena[first:first + width * count].view(np.uint16 if width == 2 else np.float32), np.empty(part, np.float32)
            self.comm.Reduce_scatter_block(widened(whole) if width == 2 else whole, total)
            model.c.arena_put(own, (rounded(total) if width == 2 else total).view(np.uint8))

    def gather(self, model):
        """After a step: every rank gets the weights that the others have moved. The gradients are lost."""
        if self.size == 1:
            return
        (address, *_, stream), size = model.c.arena(), model.c.exchange(True)
        arena = None if self._nccl(model) else model.c.arena_get()
        self.every(None)
        if arena is None:
            self.bindings.all_gather(address + size * self.rank, address, size, self.core.UINT8, self.bindings.Comm(self.nccl.ptr), stream)
        else:
            self.comm.Allgather(self.mpi.IN_PLACE, arena[:size * self.size])
            model.c.arena_put(0, arena)
        model.c.exchange(False)

    def moments(self, model, everywhere=False):
        """Yields (name, (m, v, master weights or None)) as Model.moments, whole on the first rank, or everywhere; elsewhere None for each."""
        for name, shape in model.names.items():
            held = model.c.moments(name)
            if held is not None:
                yield name, tuple(part if part is None or self.size == 1 else self._whole(part.ravel(), shape, everywhere) for part in held)

    def _whole(self, part, shape, everywhere):
        whole = np.empty(shape, part.dtype) if everywhere or self.first else None
        counts = self.every(part.size)
        if everywhere:
            self.comm.Allgatherv(part, [whole, counts])
        else:
            self.comm.Gatherv(part, None if whole is None else [whole, counts])
        return whole

    def _nccl(self, model):
        return model.device == "cuda" and self.nccl

    @cached_property
    def nccl(self):
        """NCCL's communicator of this rank's GPU; None, and it is said why, where there can be none: then arrays go through host memory."""
        found = key = reason = None
        try:
            from nccl import core
            from nccl.bindings import nccl as bindings
            if not core.get_version().libnccl:
                raise ImportError("libnccl is not found")
            self.core, self.bindings, key = core, bindings, core.get_unique_id() if self.first else None
        except Exception as error:  # ImportError, or what the library says
            reason = said(error)
        if not any(self.every(reason)):
            key = self.every(key)[0]
            try:
                found = self.core.Communicator.init(self.size, self.rank, key)
            except Exception as error:  # such as two ranks on one GPU
                reason = said(error)
        reasons = [one for one in self.every(reason) if one]
        if reasons and self.first:
            print(f"mambainllama: without NCCL ({reasons[0]}) gradients and weights go through host memory; "
                  "pip install 'mambainllama[nccl]' brings it", file=sys.stderr)
        return None if reasons else found

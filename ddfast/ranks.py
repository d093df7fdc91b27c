"""Many processes at work on one run: who this one is, and where all of them wait for each other.

`torchrun` starts the processes, restarts them when one dies, and tells each in its environment who it is. What is
here is the little that is left: work is divided by number, results are files, and processes exchange a line of text
where they meet. Tensors never travel, so the CPU's gloo carries everything; with GPUs NCCL is set up beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ddfast.errors import DDFastError, UsageError

T = TypeVar("T")

_JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to start
# For the slowest process to finish its share of a stage. A dead one is noticed at once, by its closed connection.
_STAGE_TIMEOUT = timedelta(hours=24)
_MESSAGE_BYTES = 4096
_FAILURE_CHARACTERS = 300  # of which each is at most 12 bytes of JSON


class PeerError(DDFastError):
    """Another process of the run stopped, so this one cannot go on."""

    exit_code = 2


@dataclass
class Ranks:
    """The processes of a run, seen from one of them. One process alone is `Ranks()`.

    Attributes:
        rank: number of this process, 0 to size - 1. Rank 0 is the main one: it alone writes what is shared.
        size: number of processes (torchrun's world size).
        local_rank: number of this process on its host, which picks its GPU.
        local_size: number of processes on its host, which share its cores.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _group: Any = None
    _leaves: bool = False  # whether `leave` ends what `join` began

    @property
    def main(self) -> bool:
        """Whether this is the process that sweeps, writes the manifest and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's numbers of 0 to count - 1: every size-th, from its rank on."""
        return range(self.rank, count, self.size)

    def meet(self, place: str, failure: str = "") -> None:
        """Wait for all processes at `place`; say why this one failed, or learn that another has.

        Raises:
            PeerError: a process said why it failed, or is gone.
            UsageError: the processes were started with different commands.
        """
        if self.size == 1:
            return
        text = json.dumps({"place": place, "failure": failure[:_FAILURE_CHARACTERS]})
        said = [json.loads(message) for message in self._gather(text)]
        places = sorted({message["place"] for message in said})
        if len(places) > 1:
            raise UsageError(f"the ranks run different commands: they met at {' and '.join(places)}")
        if failure:
            return
        for rank, message in enumerate(said):
            if message["failure"]:
                error = PeerError(f"rank {rank} stopped: {message['failure']}")
                error.shared = True
                raise error

    def _gather(self, text: str) -> list[str]:
        """The texts of all processes by rank."""
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(text.encode("ascii").ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(every, mine, group=self._group)
        except RuntimeError as error:
            raise PeerError(
                "lost another rank: it was killed or stopped with a message of its own; "
                "start the same command again with --resume"
            ) from error
        return [bytes(other.tolist()).decode("ascii") for other in every]

    def together(self, place: str, work: Callable[[], T]) -> T:
        """Do `work` on every process and meet: where one fails, all stop, with its reason.

        Raises:
            DDFastError: of `work`, here; `PeerError`: of another process.
        """
        try:
            result = work()
        except DDFastError as error:
            self._tell(place, error)
            raise
        self.meet(place)
        return result

    def main_first(self, place: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and then on the others, who find what it has left (a cache, a download)."""
        if self.main:
            result = self.together(place, work)
            self.meet(f"{place}, others")
            return result
        self.meet(place)
        return self.together(f"{place}, others", work)

    def on_main(self, place: str, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 alone while the others wait. Errors as `together`."""
        self.together(place, work if self.main else lambda: None)

    def _tell(self, place: str, error: DDFastError) -> None:
        """Let the others know of an error that stops this process; theirs is then printed once, by rank 0."""
        if self.size == 1:
            return
        try:
            self.meet(place, failure=" ".join(str(error).split()) or type(error).__name__)
            error.shared = True
        except DDFastError:
            return  # they are gone or elsewhere: this process's own error says more

    def leave(self) -> None:
        """End what `join` began."""
        if self._leaves:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
            self._leaves, self._group = False, None


def join() -> Ranks:
    """The processes that torchrun started with this one, once all of them are there; else this one alone.

    A program that has set up `torch.distributed` itself keeps its own process group; all its processes must make the
    call.

    Raises:
        UsageError: the environment names several processes, but they do not find each other.
    """
    import torch.distributed as dist

    size = int(os.environ.get("WORLD_SIZE", "1"))
    running = dist.is_available() and dist.is_initialized()
    if not running and size == 1:
        return Ranks()
    if not running and os.environ.get("MASTER_PORT") == "0":
        raise UsageError(
            "torchrun was given port 0, which its processes cannot find: use --standalone or a port"
        )
    try:
        if not running:
            backend = (
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            )
            store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
            # torchrun's store outlives its restarts, with the addresses of the processes that are dead.
            fresh = dist.PrefixStore(f"ddfast/{_agree_on_round(store, rank, size)}", store)
            dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=_JOIN_TIMEOUT)
        if dist.get_world_size() == 1:
            return Ranks()
        group = dist.new_group(backend="gloo", timeout=_STAGE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"the {size} processes of this run do not find each other ({reason}): start them with torchrun"
        ) from error
    rank = dist.get_rank()
    return Ranks(
        rank=rank,
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        _group=group,
        _leaves=not running,
    )


def _agree_on_round(store: Any, rank: int, size: int) -> str:
    """A name for this start of all processes, which no earlier start had, whatever is left of those in the store.

    Each process says a nonce. Rank 0 proposes the nonces that it sees, those of the dead at first among them;
    a process accepts a proposal that holds its own, and once all have accepted the same one it is the name.

    Raises:
        RuntimeError: not all processes were there in time.
    """
    nonce, deadline = secrets.token_hex(8), time.monotonic() + _JOIN_TIMEOUT.total_seconds()
    store.set(f"ddfast/nonce/{rank}", nonce)
    while time.monotonic() < deadline:
        if rank == 0:
            proposal = " ".join(_said(store, f"ddfast/nonce/{other}") for other in range(size))
            store.set("ddfast/proposal", proposal)
        proposal = _said(store, "ddfast/proposal")
        if proposal.split(" ")[rank : rank + 1] == [nonce]:
            store.set(f"ddfast/accepted/{rank}", proposal)
        if rank == 0 and all(_said(store, f"ddfast/accepted/{other}") == proposal for other in range(size)):
            store.set("ddfast/agreed", proposal)
        agreed = _said(store, "ddfast/agreed")
        if agreed.split(" ")[rank : rank + 1] == [nonce]:
            return hashlib.blake2b(agreed.encode(), digest_size=8).hexdigest()
        time.sleep(0.02)
    raise RuntimeError(f"not all were there within {_JOIN_TIMEOUT.total_seconds() / 60:.0f} minutes")


def _said(store: Any, key: str) -> str:
    """What stands under a key of the store, "" where nothing does."""
    return store.get(key).decode("ascii") if store.check([key]) else ""


def is_main() -> bool:
    """Whether this process is rank 0, or alone, by its environment: for what is printed before or after a run."""
    return os.environ.get("RANK", "0") == "0"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

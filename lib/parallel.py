"""
Several processes: join them, share values, save on rank 0, and stop all of them.

    rank, world, device = join_processes(device)        # (0, 1, device) without torchrun
    value = broadcast_from_rank0(value, world)
"""

import importlib
import os
import signal
from contextlib import suppress
from pathlib import Path

from lib.settings import UserError

import torch
import torch.distributed as dist


def join_processes(device: str) -> tuple[int, int, str]:
    """Join the process group of torchrun; return (rank, world size, device), a GPU of its own for each process. Without
    torchrun a process is alone: (0, 1, device). End with dist.destroy_process_group()."""
    if "RANK" not in os.environ:
        return 0, 1, device
    try:
        rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        raise UserError("RANK, WORLD_SIZE, LOCAL_RANK: not as torchrun sets them. Unset them to train alone.") from None
    if world > 1:
        if device.startswith("cuda:"):
            raise UserError(f"--device={device}: each of {world} processes takes its own GPU. Use --device=cuda.")
        # If torch._dynamo imported this module later, its default arguments would keep our group alive after its end,
        # and gloo's threads could then abort the process.
        importlib.import_module("torch.distributed.nn")
        if device == "cuda":
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        torch._dynamo.config.optimize_ddp = False  # it would split each compiled block; the import takes over a second
    return rank, world, device


def broadcast_from_rank0(value, world: int):
    """Return rank 0's value on every rank. Every process must call it at the same point."""
    shared = [value]
    if world > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def save_on_rank0(path: Path, write, rank: int, world: int, say) -> bool:
    """Let rank 0 call write(path). If the disk is full, print a warning and return False on every rank; the previous
    file is kept, and training continues."""
    problem = ""
    try:
        write(path) if rank == 0 else None
    except OSError as error:
        problem = str(error)
    problem = broadcast_from_rank0(problem, world)
    if problem:
        say(f"!! {path} could not be written ({problem}); training continues")
    return not problem


class StopSignal:
    """On Ctrl-C, SIGTERM or a lost terminal, ask the run to save and end after this step; on a second signal, quit."""

    def __init__(self, rank: int):
        self.asked, self.rank = 0, rank  # asked: the signal's number, or 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup ignores it
            if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = number
        text = f"\n{signal.Signals(number).name}: saving at the end of this step; once more to quit at once\n"
        if self.rank == 0:
            with suppress(OSError):
                os.write(1, text.encode())  # not print(), which the signal may have interrupted

"""
CUDA graphs: work on a GPU, recorded once, compared with the plain computation and then replayed. A small model's
kernels run for microseconds, and Python takes longer to start one.

    replay = record_step(compute, rows, other_rows, params, alike)     # train.py: forward and backward of a micro-batch
    logits = GpuDecoder(model)(tokens, cache, position)                # generate() gets it from model.make_decoder()
"""

import threading
import time
import weakref
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

from lib.device import out_of_memory
from lib.files import first_line
from lib.settings import UserError

import torch

from fast.decode import agrees, plain_step
from model import KVCache, LayerCache, SmolLM2

GPU_WAITS = 0.7  # from this launch_share() on assume that a replay is faster: a guess, small models measured 1.0
ROOM = 512  # positions of the shortest recorded cache; the others have 2, 4, 8, ... times as many


class Replay:
    """Record compute(*inputs), which must have run before; a call replays it with other inputs of the same shapes.
    The next replay overwrites its result. If compute adds to gradients, zero them in place: it keeps addresses."""

    def __init__(self, compute, *inputs: torch.Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        try:  # thread_local: another thread may use the GPU meanwhile (app.py may load a model)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = compute(*self.inputs)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
                raise
            way_out = "Go without: --compile=off in training, --fast=False for text."  # the GPU may be unusable now
            raise UserError(f"no CUDA graph could be recorded ({error}). {way_out}") from None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.result


def launch_share(compute) -> float:
    """Measure which fraction of compute()'s time Python spends starting kernels: near 1 if the GPU waits for Python."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    compute()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    return launched / (time.perf_counter() - started)


def record_step(compute, rows, other_rows, params, alike, say=print) -> Replay | None:
    """Record compute(*rows), which adds to the gradients of `params` and returns the loss, if the GPU waits for Python.
    Return what to call instead of compute, or None, after saying why; gradients are then zero, or None without it.

    alike(found, expected) compares the gradients' norms for other_rows, which the recording has not seen."""

    def norms(compute):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        torch.manual_seed(0)  # the same dropout
        compute(*other_rows)
        return torch.stack([p.grad.norm() for p in params])

    waits, replay = launch_share(partial(compute, *rows)), None
    because = f"Python takes {waits:.0%} of a micro-batch's time to start its kernels"
    try:
        expected = norms(compute)
        replay = Replay(compute, *rows) if waits >= GPU_WAITS else None
        if replay and not alike(norms(replay), expected):
            replay, because = None, "its gradients are different"
    except RuntimeError as error:
        because = "there is not enough memory" if out_of_memory(error) else f"recording failed ({first_line(error)})"
        replay = None
    for p in params:
        p.grad = p.grad.zero_() if replay else None
    torch.cuda.empty_cache()
    say(f"replay   {'on' if replay else 'off'}: {because}")
    return replay


class StaticLayerCache(LayerCache):
    def update(self, k, v, start):  # start (1,), on the GPU: one recording serves every position
        """Write one position, and return all that there is room for; the attention mask hides those after it."""
        self.keys.index_copy_(2, start, k)
        self.values.index_copy_(2, start, v)
        return self.keys, self.values


class Recording:
    """One token for each of several texts, recorded with keys and values that one KVCache at a time borrows."""

    def __init__(self, model: SmolLM2, rows: int, capacity: int):
        c, new = model.config, partial(torch.zeros, device=model.device, dtype=model.dtype)
        shape = rows, c.num_key_value_heads, capacity, c.head_dim
        self.layers = [StaticLayerCache(new(shape), new(shape)) for _ in model.layers]
        self.shape, self.borrower, self.trusted = (rows, capacity), lambda: None, True

        def compute(tokens, position):  # (B,), (1,) -> (B, V): SmolLM2.forward with the position in a tensor
            x = model.embed_tokens(tokens[:, None])
            attn_mask = new(1, capacity).masked_fill_(torch.arange(capacity, device=x.device) > position, -torch.inf)
            cos, sin = model.rotary.at(position, x.device)
            x = model.run_blocks(x, cos, sin, SimpleNamespace(layers=self.layers), position, attn_mask)
            return model.head(model.norm(x))[:, -1]

        inputs = new(rows, dtype=torch.int64), new(1, dtype=torch.int64)
        compute(*inputs)
        self.replay = Replay(compute, *inputs)

    def serves(self, cache: KVCache | None) -> bool:
        return cache is not None and cache.layers[0].keys is self.layers[0].keys

    def lend_to(self, cache: KVCache, position: int):
        """Copy a cache's positions before `position` to here; from now on it uses these tensors."""
        for ours, theirs in zip(self.layers, cache.layers):
            for static, held in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                static[:, :, :position] = held[:, :, :position]
                static[:, :, position:] = 0  # masked, but a NaN that another text left would spread
            theirs.keys, theirs.values = ours.keys, ours.values
        self.borrower = weakref.ref(cache)


recordings = weakref.WeakKeyDictionary()  # model: the addresses of its weights, and its recordings
choosing = threading.Lock()


class GpuDecoder:
    """Compute what plain_step() computes. A graph is recorded once per number of rows and capacity, and again if
    several caches are in use at once or the weights move."""

    def __init__(self, model: SmolLM2):
        self.model, self.recording = model, None
        self.position = torch.zeros(1, device=model.device, dtype=torch.int64)
        tensors = *model.parameters(), *model.buffers(), *model.rotary.at(slice(None), model.device)
        addresses = [t.data_ptr() for t in tensors]
        if recordings.get(model, [None])[0] != addresses:
            recordings[model] = addresses, []

    @torch.inference_mode()
    def __call__(self, tokens, cache: KVCache, position: int):  # (B,) on the model's device -> (B, V)
        with torch.autocast(self.model.device.type, enabled=False):  # the caller may be inside one
            cache.reserve(position + 1)
            if self.recording is None or not self.recording.serves(cache):
                self.recording = self.borrow(tokens, cache, position)
            if not self.recording.trusted:
                return plain_step(self.model, tokens, cache, position)
            return self.recording.replay(tokens, self.position.fill_(position)).clone()  # the next one overwrites it

    def borrow(self, tokens, cache: KVCache, position: int) -> Recording:
        """Find a free recording for a cache of this size, or make one and compare it with model.py."""
        needed, model, rows = max(position + 1, cache.capacity), self.model, len(tokens)
        capacity = min(model.config.max_position_embeddings, ROOM << ((needed - 1) // ROOM).bit_length())
        with choosing:
            made = recordings[model][1]
            free = (r for r in made if r.shape == (rows, capacity) and not r.serves(r.borrower()))
            recording = next(free, None)
            if recording is None:
                made.append(recording := Recording(model, rows, capacity))
                plain = plain_step(model, tokens, cache, position)
                recording.lend_to(deepcopy(cache), position)  # a wrong one may write anywhere
                logits = recording.replay(tokens, self.position.fill_(position))
                recording.trusted = agrees(logits, plain, 0.05, "fast/graphs.py")  # sums may have another order
            recording.lend_to(cache, position)
        return recording

"""
Our loss in pieces beside torch's own: time, exactness and memory at two vocabularies, in turns. Two minutes.

    python tests/tools/loss.py

The products run in bf16 on a CPU. Errors are against float64: the loss in nats, gradients relative to
their largest.
"""

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib.device import prepare_process  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn import LinearCrossEntropyOptions  # noqa: E402

from fast import ops  # noqa: E402

SHAPES = ((5000, 4, 256), (49152, 2, 512))  # V, B, T; the width is SmolLM2-135M's


def plain(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float().flatten(0, 1), targets.flatten())


def torchs(x, weight, targets, **options):
    with torch.autocast("cpu", enabled=False):  # which does not know this function
        x, weight = x.flatten(0, 1).to(torch.bfloat16), weight.to(torch.bfloat16)
        return F.linear_cross_entropy(x, weight, targets.flatten(), options=LinearCrossEntropyOptions(**options))


WAYS = {
    "ours": ops.cross_entropy_in_pieces,
    "torch, auto": torchs,
    "torch, accurate": partial(torchs, acc_policy="accurate"),
    "torch, accurate, 512": partial(torchs, acc_policy="accurate", chunking_method=None, batch_chunk_size=512),
    "plain": plain,
}


def inputs(V, B, T):
    torch.manual_seed(0)
    x, weight = torch.randn(B, T, 576), torch.randn(V, 576) / 24
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(V, (B, T))


def run(way, x, weight, targets):
    x.grad = weight.grad = None
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = WAYS[way](x, weight, targets)
    loss.backward()
    return time.perf_counter() - started, loss.item()


def peak_mb():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def memory(way, V, B, T):
    """What two rounds add to the peak of a process of their own."""
    tensors = inputs(V, B, T)
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)  # the library's own buffers
    before = peak_mb()
    run(way, *tensors), run(way, *tensors)
    print(f"{peak_mb() - before:.0f}")


def main():
    if len(sys.argv) > 1:
        return memory(sys.argv[1], *map(int, sys.argv[2:]))
    prepare_process()  # as train.py does
    for shape in SHAPES:
        x, weight, targets = inputs(*shape)
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        true = F.cross_entropy(F.linear(*exact).flatten(0, 1), targets.flatten())
        true.backward()
        times, errors = {way: [] for way in WAYS}, {}
        for _ in range(7):  # the first round warms up
            for way in WAYS:
                seconds, loss = run(way, x, weight, targets)
                times[way].append(seconds)
                off = [float((g.grad - e.grad).abs().max() / e.grad.abs().max()) for g, e in zip((x, weight), exact)]
                errors[way] = abs(loss - true.item()), *off
        print(f"V = {shape[0]:,}, {shape[1] * shape[2]:,} tokens, {torch.get_num_threads()} threads")
        for way in WAYS:
            command = [sys.executable, __file__, way, *map(str, shape)]
            mb = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            loss, gx, gw = errors[way]
            print(f"  {way:<21} {1000 * min(times[way][1:]):7.1f} ms  {mb:>4} MB  loss off by {loss:.1e}, gradients by "
                  f"{gx:.1e} and {gw:.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""CUDA graphs in training and generation give the same numbers as without them. On a CPU a stand-in replaces the graph
and tests the code around it; a machine with a CUDA GPU tests the graph itself, too."""

import weakref
from functools import partial

import pytest
import torch
from conftest import tiny

import sample
from fast import FastSmolLM2, decode, graphs, speed_up
from fast.graphs import GpuDecoder
from fast.quantize import quantize
from model import KVCache

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is available"))


class StandIn:
    """Recomputes, on its own copies of the inputs, what a graph would replay."""

    made = replays = 0

    def __init__(self, compute, *inputs):
        StandIn.made += 1
        self.compute, self.inputs, self.result = compute, [tensor.clone() for tensor in inputs], None

    def __call__(self, *inputs):
        StandIn.replays += 1
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        result = self.compute(*self.inputs)
        self.result = result.clone() if self.result is None else self.result.copy_(result)
        return self.result


@pytest.fixture(params=["stand-in", CUDA])
def device(request, monkeypatch):
    """Return cpu or cuda. launch_share() says that a replay is faster, and models get a GpuDecoder."""
    monkeypatch.setattr(graphs, "launch_share", lambda compute: compute() * 0 + 1)
    monkeypatch.setattr(FastSmolLM2, "make_decoder", lambda self, rows: GpuDecoder(self))
    monkeypatch.setattr(decode, "warned", set())
    StandIn.made = StandIn.replays = 0
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(graphs, "Replay", StandIn)
    return "cpu"


def near(device, a, b) -> bool:
    """Compare to the last bit with the stand-in, and up to rounding on a GPU, which may add in another order."""
    return torch.equal(a, b) if device == "cpu" else torch.allclose(a, b, rtol=1e-4)


# training


def train(device, record: bool, dropout: float = 0.0, zero: bool = True):
    """Take eight steps as train.py does; return their losses, and what the recorder printed."""
    torch.manual_seed(0)
    model, said = speed_up(tiny(max_position_embeddings=32)).to(device).train(), []
    for layer in model.layers:
        layer.dropout = dropout
    alike = lambda found, expected: bool(((found - expected).abs() <= 0.2 * expected).all())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [torch.randint(0, 512, (2, 4, 16), device=device) for _ in range(8)]

    def compute(ids, targets):
        loss = model(ids, targets, loss_only=True)[1]
        loss.backward()
        return loss.detach()

    step = compute
    if record:
        compute(*batches[0])
        replay = graphs.record_step(compute, batches[0], batches[1], list(model.parameters()), alike, said.append)
        step = replay or compute
        assert all(p.grad is None if replay is None else not p.grad.any() for p in model.parameters())
    losses = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        losses.append(step(*batch).clone())
        optimizer.step()
        if zero:
            optimizer.zero_grad(set_to_none=step is compute)
    return torch.stack(losses).cpu(), said


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_replayed_run_is_the_same(device, dropout):
    """Each step starts with zero gradients and has its own dropout mask and rows. Negative control: gradients that are
    not set to zero."""
    plain, _ = train(device, False, dropout)
    replayed, said = train(device, True, dropout)
    assert "replay   on" in said[0] and near(device, plain, replayed), (plain - replayed).abs().max()
    assert device == "cuda" or StandIn.replays == 9  # eight steps and one comparison
    assert not near(device, plain, train(device, True, dropout, zero=False)[0])


@pytest.mark.parametrize("fault", ["memory", "an old driver", "gradients", "old rows", "a busy GPU"])
def test_a_run_goes_on_without_a_replay(device, monkeypatch, fault):
    """If there is not enough memory or a new enough driver, if its gradients differ (perhaps only for rows that it was
    not recorded with), or if it would save no time, the run is the same as without it."""

    class Faulty(graphs.Replay):
        def __init__(self, compute, *inputs):
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if fault == "an old driver":
                raise RuntimeError("CUDA driver is too old\nCompile with TORCH_USE_CUDA_DSA")
            swap = (lambda row: row * 0) if fault == "gradients" else lambda row: row
            super().__init__(lambda *rows: compute(*map(swap, rows)), *inputs)

        def __call__(self, *inputs):
            return super().__call__(*(self.inputs if fault == "old rows" else inputs))

    plain, _ = train(device, False)
    monkeypatch.setattr(graphs, "Replay", Faulty)
    if fault == "a busy GPU":
        monkeypatch.setattr(graphs, "launch_share", lambda compute: 0.5)
    found, said = train(device, True)
    assert said[0].startswith("replay   off: ") and near(device, plain, found)
    told = "enough memory" in said[0], "(CUDA driver is too old)" in said[0]
    assert told == (fault == "memory", fault == "an old driver")


# generating


@pytest.mark.parametrize("rows, kind", [(1, "float32"), (3, "float32"), (1, "int8")])
def test_recorded_logits_are_the_same(device, monkeypatch, rows, kind):
    """Also when the cache grows and under autocast. Negative control: logits that are one position off."""
    monkeypatch.setattr(graphs, "ROOM", 64)
    model = speed_up(tiny(max_position_embeddings=256).to(device))
    if kind == "int8":
        quantize(model)
    tokens = torch.randint(3, 512, (251, rows), device=device)
    prompt, found = torch.randint(3, 512, (rows, 5), device=device), []
    for step in (partial(sample.prefill, model), GpuDecoder(model)):
        cache, logits = KVCache(model.config, rows, model.device, model.dtype), []
        sample.prefill(model, prompt, cache)
        for n, new in enumerate(tokens):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=isinstance(step, GpuDecoder)):
                logits.append(step(new if isinstance(step, GpuDecoder) else new[:, None], cache, 5 + n))
        found.append(torch.stack(logits).float().cpu())
    plain, recorded = found
    allowed = 1e-4 if kind == "float32" else 0.1 * float(plain.std())
    assert (plain - recorded).abs().max() < allowed < (plain[1:] - recorded[:-1]).abs().max()
    assert device == "cuda" or StandIn.made == 3  # 64, 128 and 256 positions


def test_a_graph_is_recorded_once_per_shape(device):
    """Not once per generate(), also past the context, where the cache is filled again from its beginning. A second text
    at the same time gets its own cache, and a graph is recorded again if the weights have moved in memory."""
    model, plain = speed_up(tiny().to(device)), {}
    text = partial(sample.generate, model, max_new_tokens=100, temperature=0, stop_ids=[])
    for prompt in ((5, 6, 7), (9, 8)):
        plain[prompt] = [int(i) for i in text(prompt, fast=False)]
    for prompt in ((5, 6, 7), (9, 8), (5, 6, 7)):
        assert [int(i) for i in text(prompt)] == plain[prompt]
    assert len(graphs.recordings[model][1]) == 1
    together = [[int(i) for i in pair] for pair in zip(*map(text, plain))]
    assert list(map(list, zip(*together))) == list(plain.values()) and len(graphs.recordings[model][1]) == 2
    [int(i) for i in text((5, 6, 7))]
    assert len(graphs.recordings[model][1]) == 2
    for p in model.parameters():
        p.data = p.data * -1.5
    moved = [int(i) for i in text((5, 6, 7), fast=False)]
    assert [int(i) for i in text((5, 6, 7))] == moved != plain[5, 6, 7] and len(graphs.recordings[model][1]) == 1


def test_a_conversation_keeps_its_cache(device):
    """The cache of a conversation that waits for the next question is not given to another text."""
    model = speed_up(tiny().to(device))
    cache, ids = KVCache(model.config, 1, model.device), [5, 6, 7]
    for question in ([8, 9], [10, 11, 12]):
        options = dict(max_new_tokens=8, temperature=0, stop_ids=[])
        expected = [int(i) for i in sample.generate(model, ids + question, fast=False, **options)]
        cached = max(0, len(ids) - 1)
        ids += question
        kept = {} if cached < 5 else dict(cached=cached)
        assert [int(i) for i in sample.generate(model, ids, cache=cache, **kept, **options)] == expected
        ids += expected
        list(sample.generate(model, [100, 200, 300], **options))  # another text in between
    del cache
    assert all(r.borrower() is None for r in graphs.recordings[model][1]), "the cache must be free at the end"


def test_a_model_that_is_gone_takes_its_recordings_along(device):
    """A graph and its cache hold GPU memory, which must be freed with the model."""
    model = speed_up(tiny().to(device))
    list(sample.generate(model, [5, 6], 3))
    gone = weakref.ref(graphs.recordings[model][1][0])
    del model
    assert device == "cpu" or gone() is None  # the stand-in keeps the model


@pytest.mark.parametrize("fault", ["logits", "old token", "old position"])
def test_a_wrong_recording_is_not_used(device, monkeypatch, capsys, fault):
    """It warns once, and model.py writes the text."""
    model = speed_up(tiny().to(device))
    plain = [int(i) for i in sample.generate(model, [5, 6, 7], 9, temperature=0, stop_ids=[], fast=False)]

    class Faulty(graphs.Replay):
        def __init__(self, compute, *inputs):
            token, place = (tensor.clone() for tensor in inputs)
            wrong = {
                "logits": lambda new, at: compute(new, at).flip(-1),
                "old token": lambda new, at: compute(token, at),
                "old position": lambda new, at: compute(new, place),
            }
            super().__init__(wrong[fault], *inputs)

    monkeypatch.setattr(graphs, "Replay", Faulty)
    for _ in range(2):
        assert [int(i) for i in sample.generate(model, [5, 6, 7], 9, temperature=0, stop_ids=[])] == plain
    assert capsys.readouterr().err.count("fast/graphs.py and model.py disagree") == 1

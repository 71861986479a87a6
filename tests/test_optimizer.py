"""optimizer.py: which parameters get which update, Muon's numbers, and the learning rate at each step."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny

from optimizer import Muon, check_schedule, decay_begins, learning_rate_at, make_optimizers, noise_ends


def make(kind, **changes):
    torch.manual_seed(0)
    model = tiny(**changes)
    return model, make_optimizers(model, kind, 0.01, 0.1, (0.9, 0.95))


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def train(model, optimizers, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        ids = torch.randint(model.config.vocab_size, (16, 33))
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    """A parameter in two groups is updated twice, one in none never; a norm with weight decay goes to 0."""
    for kind in ("adamw", "muon"):
        for tied in (True, False):
            model, optimizers = make(kind, tie_word_embeddings=tied)
            placed = [(id(p), group["weight_decay"]) for group in groups_of(optimizers) for p in group["params"]]
            expected = [(id(p), 0.1 if p.dim() > 1 else 0.0) for p in model.parameters()]
            assert sorted(placed) == sorted(expected), kind


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    """All singular values of Muon's update are similar. The embedding's are not, and its unread rows stay unchanged."""
    model, optimizers = make("muon", tie_word_embeddings=False)
    muon = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert muon == {id(p) for p in model.layers.parameters() if p.dim() == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in groups_of(optimizers):
        group["weight_decay"] = 0.0
    train(model, optimizers, 1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            values = torch.linalg.svdvals(p.detach() - before[name])
            assert bool(values[len(values) // 2] > 0.62 * values[0]) == (id(p) in muon), f"{name}: {values}"
    torch.manual_seed(0)  # as train() draws them
    read = torch.randint(model.config.vocab_size, (16, 33)).flatten().tolist()
    unread = set(range(model.config.vocab_size)) - set(read)
    moved = (model.embed_tokens.weight.detach() - before["embed_tokens.weight"]).abs().sum(1)
    assert unread and all(moved[i] == 0 for i in unread) and moved.max() > 0


def test_saved_and_loaded_the_next_steps_are_bit_equal():
    """Saved after three steps and loaded into new optimizers. Negative control: without their state."""
    model, optimizers = make("muon")
    train(model, optimizers, 3)
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    copies = {}
    for name in ("resumed", "without the state"):
        copies[name] = make("muon")
        copies[name][0].load_state_dict(model.state_dict())
    for optimizer, state in zip(copies["resumed"][1], saved):
        optimizer.load_state_dict(state)
    for m, o in ((model, optimizers), *copies.values()):
        train(m, o, 2, first=3)
    for name, (m, _) in copies.items():
        equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), m.parameters()))
        assert equal == (name == "resumed"), name


def test_muon_gives_the_numbers_of_pytorchs():
    """Ours updates matrices of one shape together, in fp32; theirs updates them one by one, in bfloat16. The matrices
    are tall, wide and square. Negative control: another momentum."""
    shapes = [(48, 16), (16, 48), (32, 32), (16, 48)]

    def moved(make):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = make(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    theirs = moved(lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"))
    start = moved(lambda p: Muon(p, 0.0, 0.0))
    ours, other = moved(lambda p: Muon(p, 0.02, 0.5)), moved(lambda p: Muon(p, 0.02, 0.5, momentum=0.5))
    way = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.01 * way
    assert (other - theirs).norm() > 0.05 * way


@dataclass
class Schedule:
    """The settings of train.py that the schedule reads."""

    lr_schedule: str = "cosine"
    max_iters: int = 100
    lr_decay_iters: int = 100
    learning_rate: float = 1.0
    min_lr: float = 0.1
    warmup_iters: int = 10
    decay_fraction: float = 0.2
    token_noise: float = 0.0
    noise_until: float = 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_schedule_has_its_corners_where_they_belong(schedule):
    """The rate is never 0, peaks right after warmup, stays flat as long as it should, and ends at min_lr."""
    rates = [learning_rate_at(step, Schedule(schedule)) for step in range(120)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[10] == 1.0
    if schedule == "constant":
        return
    assert rates[100:] == [0.1] * 20 and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    flat = 80 if schedule == "wsd" else 10  # the last step at the peak
    assert rates[flat] == 1.0 > rates[flat + 1] and rates[90] == pytest.approx(
        0.55 if schedule == "wsd" else 0.127, 0.01
    )


def test_noise_can_end_exactly_where_the_decay_begins():
    """noise_until=0.8 fits decay_fraction=0.2 for every length of the schedule."""
    s = Schedule("wsd", token_noise=0.1, noise_until=0.8)
    for s.lr_decay_iters in range(1, 2000):
        assert noise_ends(s) >= decay_begins(s)


def test_schedules_that_make_little_sense_are_named():
    """A short trial run with the default warmup, a longer run whose schedule has ended, and a rate below min_lr."""
    assert "--warmup_iters" in check_schedule(Schedule(warmup_iters=101))[0] and not check_schedule(Schedule())
    assert "--min_lr" in check_schedule(Schedule(min_lr=2.0))[0]
    assert "--lr_decay_iters=200" in check_schedule(Schedule(max_iters=200))[0]

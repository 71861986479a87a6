"""The optimizer: which parameters get which update, and that two optimizers act as one."""

import copy

import torch
from conftest import tiny

from optimizer import Muon, make_optimizer


def made(kind, **changes):
    torch.manual_seed(0)
    model = tiny(**changes)
    return model, make_optimizer(model, kind, 0.01, 0.1, (0.9, 0.95))


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        ids = torch.randint(model.config.vocab_size, (16, 33))
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    """A parameter in two groups is updated twice, one in none stays as it was drawn; a norm that decays goes to 0."""
    for kind in ("adamw", "muon"):
        for tied in (True, False):
            model, optimizer = made(kind, tie_word_embeddings=tied)
            placed = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
            expected = [(id(p), 0.1 if p.dim() > 1 else 0.0) for p in model.parameters()]
            assert sorted(placed) == sorted(expected), kind


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    """Its update has all singular values alike. That of an embedding has not, and rows that were not read stay."""
    model, optimizer = made("muon", tie_word_embeddings=False)
    muon = {id(p) for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    assert muon == {id(p) for p in model.layers.parameters() if p.dim() == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    train(model, optimizer, 1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            values = torch.linalg.svdvals(p.detach() - before[name])
            assert bool(values[len(values) // 2] > 0.62 * values[0]) == (id(p) in muon), f"{name}: {values}"
    torch.manual_seed(0)  # as train() draws them
    read = torch.randint(model.config.vocab_size, (16, 33)).flatten().tolist()
    unread = set(range(model.config.vocab_size)) - set(read)
    moved = (model.embed_tokens.weight.detach() - before["embed_tokens.weight"]).abs().sum(1)
    assert unread and all(moved[i] == 0 for i in unread) and moved.max() > 0


def test_the_state_of_two_is_that_of_one():
    """Saved after three steps and loaded into new optimizers, the next steps are equal to the last bit."""
    model, optimizer = made("muon")
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    count = len(list(model.parameters()))
    assert sorted(saved["state"]) == list(range(count)) == [i for g in saved["param_groups"] for i in g["params"]]
    copies = {}
    for name in ("resumed", "without the state"):
        copies[name] = made("muon")
        copies[name][0].load_state_dict(model.state_dict())
    copies["resumed"][1].load_state_dict(saved)
    for m, o in ((model, optimizer), *copies.values()):
        train(m, o, 2, first=3)
    for name, (m, _) in copies.items():
        equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), m.parameters()))
        assert equal == (name == "resumed"), name


def test_muon_gives_the_numbers_of_pytorchs():
    """Ours takes matrices of one shape together and iterates in fp32, theirs one after another in bfloat16; tall, wide
    and square ones. Half the momentum is another update."""
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

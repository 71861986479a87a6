"""quantize.py: int8 rows, the modules that replace a model's, and a tied head that shares the embedding's numbers."""

import copy

from lib.settings import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from fast.quantize import Int8Embedding, Int8Linear, int8_rows, quantize


def test_int8_rows_are_within_half_a_step():
    """No row needs more than 127 steps, no weight is off by more than half a step: rounding the scale adds no error."""
    weight = torch.randn(64, 48) * torch.logspace(-4, 2, 64)[:, None]
    weight[5] = 0
    q, scale = int8_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and q.abs().max() <= 127
    assert ((q.float() * scale.float()[:, None] - weight).abs() <= 0.5001 * scale.float()[:, None]).all()


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_widened_int8_is_the_plain_product(rows, dtype, tolerance):
    """For few rows or many, Int8Linear is the product with the dequantized matrix, and Int8Embedding gives its rows."""
    q, scale = int8_rows(torch.randn(40, 48))
    weight = q.float() * scale.float()[:, None]
    x = torch.randn(rows, 48).to(dtype)
    plain, found = x.float() @ weight.T, Int8Linear(q, scale)(x)
    allowed = tolerance * float(plain.std())
    assert found.shape == (rows, 40) and (found.float() - plain).abs().max() < allowed
    shifted = Int8Linear(q, scale.roll(1))(x)  # negative control: each row with its neighbour's scale
    assert (shifted.float() - plain).abs().max() > allowed
    ids = torch.randint(0, 40, (2, rows))
    assert torch.equal(Int8Embedding(q, scale)(ids), F.embedding(ids, weight.to(torch.bfloat16)))


@pytest.mark.parametrize("tied", [True, False])
def test_int8_model_is_near_in_one_pass_and_token_by_token(tied):
    """Its logits are near those of the exact model, whether it reads many tokens at once or few."""
    model = tiny(tie_word_embeddings=tied)
    ids = torch.randint(0, 512, (1, 40))
    exact, n = model(ids)[0], model.num_parameters()
    quantize(model)
    assert model.num_parameters() == n
    many, few = model(ids)[0].float(), torch.cat([model(ids[:, :i])[0].float()[:, -1:] for i in (1, 2, 3)], 1)
    scale = exact.std()
    assert (many - exact).abs().mean() < 0.05 * scale and (few - many[:, :3]).abs().max() < 0.1 * scale


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_alone_of_an_int8_model_is_that_of_its_logits(tied):
    """Without their scales the int8 weights would give a loss in the thousands, in evaluate.py, too. Negative control:
    one changed target."""
    model = quantize(tiny(tie_word_embeddings=tied))
    ids, targets = torch.randint(0, 512, (2, 30)), torch.randint(0, 512, (2, 30))
    targets[0, :11] = -100
    with torch.no_grad():
        loss = float(model(ids, targets)[1])
        none, alone = model(ids, targets, loss_only=True)
        assert none is None and abs(float(alone) - loss) <= 1e-6 * loss
        documents = torch.zeros_like(ids)
        assert abs(float(model(ids, targets, documents=documents, loss_only=True)[1]) - loss) <= 1e-2 * loss
        targets[0, 11] = (targets[0, 11] + 1) % 512
        assert abs(float(model(ids, targets, loss_only=True)[1]) - loss) > 1e-4 * loss


def test_a_tied_int8_head_shares_the_numbers_of_the_embedding():
    """One matrix in memory and one parameter in the count; an untied head has a matrix of its own."""
    model = quantize(tiny(tie_word_embeddings=True))
    head, embedding = model.lm_head, model.embed_tokens
    assert head.weight is embedding.weight and head.scale.data_ptr() == embedding.scale.data_ptr()
    assert model.num_parameters()["total"] == tiny().num_parameters()["total"]
    model = copy.deepcopy(model)
    assert model.lm_head.weight is model.embed_tokens.weight, "a copy must not untie them"
    untied = quantize(tiny(tie_word_embeddings=False))  # negative control
    assert untied.lm_head.weight.data_ptr() != untied.embed_tokens.weight.data_ptr()
    assert untied.num_parameters()["total"] == model.num_parameters()["total"] + 512 * 48


def test_another_kind_of_quantization_is_refused_by_name():
    with pytest.raises(UserError, match="'int3': only 'int8'"):
        quantize(tiny(), "int3")

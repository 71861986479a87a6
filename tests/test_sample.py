"""sample.py: each filter against a distribution worked out by hand; generation against the plainest way to do it."""

from lib.settings import UserError

import pytest
import torch
from conftest import TEXT, run_script, save_hf_directory, tiny_hf

import sample
from checkpoint import read_tokenizer
from model import KVCache
from prepare import train_bpe

P = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02, 0.0, 0.0, 0.0]])  # ten tokens, two of them equally likely
LOGITS = P.log()


def kept(logits):
    return torch.isfinite(logits)[0].nonzero().flatten().tolist()


def test_top_k_keeps_exactly_k_even_among_equals():
    assert kept(sample.keep_top_k(LOGITS, 1)) == [0]
    assert len(kept(sample.keep_top_k(LOGITS, 2))) == 2
    assert kept(sample.keep_top_k(LOGITS, 3)) == [0, 1, 2]
    assert kept(sample.keep_top_k(LOGITS, 99)) == [0, 1, 2, 3, 4, 5, 6]


def test_top_p_keeps_the_fewest_that_reach_p():
    assert kept(sample.keep_top_p(LOGITS, 0.39)) == [0]
    assert kept(sample.keep_top_p(LOGITS, 0.55)) == [0, 1]
    assert kept(sample.keep_top_p(LOGITS, 0.75)) == [0, 1, 2]
    assert kept(sample.keep_top_p(LOGITS, 1e-9)) == [0]
    assert len(kept(sample.keep_top_p(LOGITS, 1.0))) >= 7


def test_min_p_is_relative_to_the_likeliest():
    assert kept(sample.keep_min_p(LOGITS, 0.49)) == [0, 1, 2]
    assert kept(sample.keep_min_p(LOGITS, 0.24)) == [0, 1, 2, 3]
    assert kept(sample.keep_min_p(LOGITS, 1.0)) == [0]


def test_repetition_penalty_pushes_seen_tokens_down_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    out = sample.penalize_repetition(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0]]


def test_temperature_zero_is_greedy_and_one_is_the_models_own_odds():
    for temperature in (0, 1e-300, 1e-6):  # dividing by so little would overflow
        assert sample.next_token(LOGITS, temperature=temperature).tolist() == [0]
    generator = torch.Generator().manual_seed(0)
    many = LOGITS.expand(20000, -1)
    for temperature, expected in ((1.0, P[0]), (0.5, P[0] ** 2 / (P[0] ** 2).sum())):
        counts = sample.next_token(many, temperature=temperature, generator=generator).bincount(minlength=10)
        assert (counts / 20000 - expected).abs().max() < 0.015
    hot = sample.next_token(many, temperature=1.0, top_k=2, generator=generator).bincount(minlength=10)
    assert hot[3:].sum() == 0 and (hot > 0).sum() == 2


@pytest.mark.parametrize(
    "wrong",
    [dict(temperature=-1), dict(top_k=0), dict(top_p=0), dict(min_p=2), dict(repetition_penalty=0),
     dict(max_new_tokens=0), dict(temperature=float("nan")), dict(temperature=1e300), dict(repetition_penalty=1e-300),
     dict(seed=-1), dict(seed=2**64), dict(temperature=None), dict(top_k=1.5)],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong, hf_directory):
    """The error names the setting and, if it can be switched off, the value that does so."""
    model, _ = sample.load(hf_directory)
    with pytest.raises(UserError, match=next(iter(wrong))) as refused:
        next(sample.generate(model, [1, 2], **wrong))
    if wrong == dict(top_k=0):
        assert "none" in str(refused.value).lower()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_no_text(hf_directory, bad, temperature):
    """A draw from NaN would give id V, and decode.c would read past the embedding. next_token() returns -1 instead, and
    generate() stops."""
    model, _ = sample.load(hf_directory)
    with torch.no_grad():
        model.norm.weight[3] = bad
    for prompt in ([1, 2], [[1, 2], [3, 4]]):
        with pytest.raises(UserError, match="not finite"):
            list(sample.generate(model, torch.tensor(prompt), 3, temperature=temperature))
    logits = LOGITS.repeat(2, 1)
    logits[1] = -torch.inf
    logits[0, 1:] = -torch.inf
    assert sample.next_token(logits, temperature=temperature).tolist() == [0, -1]


def test_a_prompt_is_text(hf_directory):
    """An empty prompt becomes a line break, as in the app. Text that UTF-8 cannot encode is refused."""
    tokenizer = read_tokenizer(hf_directory)
    assert sample.encode_prompt(tokenizer, "", 64) == sample.encode_prompt(tokenizer, "\n", 64) != []
    with pytest.raises(UserError, match="not valid text"):
        sample.encode_prompt(tokenizer, "a\ud800", 64)


def test_of_a_huge_prompt_the_end_is_encoded(hf_directory):
    """Encoding ten million characters would take ten seconds and 1.7 GB, but only a few thousand tokens are used."""
    tokenizer, seen = read_tokenizer(hf_directory), []

    class Spy:
        def encode(self, text, **more):
            seen.append(len(text))
            return tokenizer.encode(text, **more)

    text = "What news from the reef? " * 400_000
    ids = sample.encode_prompt(Spy(), text, 64)
    assert seen == [64 * 64] and ids[-64:] == tokenizer.encode(text[-9000:]).ids[-64:]


@pytest.mark.slow
def test_the_last_seed_has_a_next_sample(hf_directory):
    """seed + i wraps around to 0, and --prompt= is a line break."""
    arguments = [f"--model={hf_directory}", "--prompt=", "--max_new_tokens=3", f"--seed={2**63 - 1}"]
    done = run_script("sample.py", *arguments, "--num_samples=2")
    assert done.returncode == 0 and done.stderr.count("[3 tokens") == 2, done.stderr
    alone = run_script("sample.py", *arguments[:3], "--seed=0")
    assert alone.returncode == 0 and done.stdout.endswith(alone.stdout)


def test_generate_equals_the_uncached_way(hf_directory):
    """The reference recomputes everything for each token; cache and prefill must give the same ids."""
    model, _ = sample.load(hf_directory)
    ids = list(range(5, 22))
    ours = [int(i) for i in sample.generate(model, ids, 40, temperature=0, stop_ids=[])]
    for _ in range(40):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert ours == ids[17:] and len(set(ours)) > 3


def sliding_reference(model, prompt, n):
    """Do what generate() documents past the context in the plainest way: keep the newer half and read it again."""
    context, window, out = model.config.max_position_embeddings, prompt[-model.config.max_position_embeddings :], []
    for _ in range(n):
        with torch.no_grad():
            new = int(model(torch.tensor([window]))[0][0, -1].argmax())
        out.append(new)
        window = (window[-(context // 2) :] if len(window) == context else window) + [new]
    return out


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_past_the_context_it_slides_as_documented(hf_directory, length):
    """Prompts below, at and beyond the context; a bound checked on T instead of start + T made peers crash here."""
    model, _ = sample.load(hf_directory)
    prompt = [(7 * i) % 500 + 3 for i in range(length)]
    ours = [int(i) for i in sample.generate(model, prompt, 100, temperature=0, stop_ids=[])]
    assert ours == sliding_reference(model, prompt, 100)


def test_a_prompt_in_chunks_is_the_prompt(hf_directory, monkeypatch):
    model, _ = sample.load(hf_directory)
    ids = torch.arange(3, 50)[None]
    whole = sample.prefill(model, ids, KVCache(model.config, 1))
    monkeypatch.setattr(sample, "PREFILL_CHUNK", 7)
    assert (sample.prefill(model, ids, KVCache(model.config, 1)) - whole).abs().max() < 1e-5


def test_batch_rows_do_not_see_each_other_and_stop_one_by_one(hf_directory):
    """Greedy rows of a batch equal the rows alone; a row that has ended repeats its end token until all have."""
    model, _ = sample.load(hf_directory)
    prompts = torch.tensor([[5, 6, 7, 8], [100, 90, 80, 70], [9, 300, 9, 301]])
    alone = [[int(i) for i in sample.generate(model, p.tolist(), 20, temperature=0, stop_ids=[])] for p in prompts]
    batch = torch.stack(list(sample.generate(model, prompts, 20, temperature=0, stop_ids=[])), 1).tolist()
    assert batch == alone
    stop = alone[0][4]
    steps = torch.stack(list(sample.generate(model, prompts, 20, temperature=0, stop_ids=[stop])), 1).tolist()
    first = alone[0].index(stop)
    assert steps[0][: first + 1] == alone[0][: first + 1] and set(steps[0][first:]) == {stop}


def test_it_stops_at_any_of_the_models_end_tokens(hf_directory):
    """config.json may hold one id or a list; the id is yielded, then nothing more."""
    model, _ = sample.load(hf_directory)
    free = [int(i) for i in sample.generate(model, [5, 6, 7], 30, temperature=0, stop_ids=[])]
    model.config.eos_token_id = [511, free[3]]
    assert [int(i) for i in sample.generate(model, [5, 6, 7], 30, temperature=0)] == free[: free.index(free[3]) + 1]


def test_a_seed_is_a_text_and_requests_do_not_disturb_each_other(hf_directory):
    """Interleaved requests give what each gives alone; the caller's own RNG stays where it was."""
    model, _ = sample.load(hf_directory)
    before = torch.get_rng_state()
    alone = [[int(i) for i in sample.generate(model, [5, 6], 20, seed=s, stop_ids=[])] for s in (1, 2)]
    pair = zip(*(sample.generate(model, [5, 6], 20, seed=s, stop_ids=[]) for s in (1, 2)))
    assert [list(map(int, row)) for row in zip(*pair)] == alone and alone[0] != alone[1]
    assert torch.equal(before, torch.get_rng_state())


def test_unwritten_cache_rows_are_never_read(hf_directory):
    """Rows beyond the text may hold anything, NaN included."""
    model, _ = sample.load(hf_directory)
    cache = KVCache(model.config, 1)
    cache.reserve(64)
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    with torch.no_grad():
        logits, _ = model(torch.arange(3, 20)[None], cache=cache, start=0)
        step, _ = model(torch.tensor([[7]]), cache=cache, start=17)
    assert torch.isfinite(logits).all() and torch.isfinite(step).all()


def test_the_cache_grows_with_use(hf_directory):
    """A short answer does not reserve the whole context, and the cache refuses to grow beyond it."""
    model, _ = sample.load(save_hf_directory(hf_directory.parent / "long", tiny_hf(max_position_embeddings=4096)))
    cache = KVCache(model.config, 1)
    sample.prefill(model, torch.arange(3, 50)[None], cache)
    assert cache.capacity == 64
    sample.prefill(model, torch.ones(1, 100, dtype=torch.int64), cache)
    assert cache.capacity == 128
    with pytest.raises(AssertionError, match="context is 4096"):
        cache.reserve(4097)


def test_streamed_text_is_whole_characters_and_equals_the_decoded_whole():
    """Decoded token by token, an emoji would become four broken characters."""
    tokenizer = train_bpe([TEXT], 400)
    text = "naïve 🦉🏽👩‍👩‍👧 漢字\r\n\0 x"
    ids = tokenizer.encode(text).ids
    pieces = list(sample.stream_text(tokenizer, (torch.tensor([i]) for i in ids)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    naive = [tokenizer.decode([i]) for i in ids]
    assert any("\ufffd" in piece for piece in naive), "negative control: the naive way does break characters"
    cut = list(sample.stream_text(tokenizer, (torch.tensor([i]) for i in ids[:8])))
    assert "".join(cut) == tokenizer.decode(ids[:8])


def test_text_that_spells_a_special_token_stays_text(hf_directory):
    tokenizer = read_tokenizer(hf_directory)
    assert 0 not in tokenizer.encode("<|endoftext|>").ids


@pytest.mark.slow
def test_the_command_prints_the_prompt_and_its_continuation(hf_directory):
    """stdout holds only the text, the same for the same seed; the statistics go to stderr."""
    arguments = ["sample.py", f"--model={hf_directory}", "--prompt=What news", "--max_new_tokens=12", "--num_samples=2"]
    one, two = run_script(*arguments), run_script(*arguments)
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout and one.stdout.count("What news") == 2 and "tokens/s" in one.stderr
    int8 = run_script(*arguments, "--quantize=int8")
    assert int8.returncode == 0 and int8.stdout.startswith("What news")
    (hf_directory / "prompt.txt").write_text("Good morrow", encoding="utf-8")
    done = run_script(*arguments, f"--prompt=FILE:{hf_directory / 'prompt.txt'}")
    assert done.returncode == 0 and done.stdout.startswith("Good morrow")
    for wrong in ("--device=tpu", "--prompt=FILE:none.txt", "--prompt=FILE:."):
        done = run_script(*arguments, wrong)
        assert done.returncode == 1 and "Traceback" not in done.stderr, wrong
    wrong = ["--dtype=half", "--temperature=-1", "--quantize=int3", "--num_samples=0", "--top_k=0", "--seed=1e3"]
    done = run_script(*arguments, *wrong)
    assert done.returncode == 2 and all(f"{flag}: " in done.stderr for flag in wrong) and "Traceback" not in done.stderr

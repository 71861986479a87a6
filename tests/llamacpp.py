"""
llama.cpp on a GGUF file, for the tests: what it tokenizes, generates and thinks likely. Through the xllamacpp wheel,
which runs llama.cpp's own HTTP server inside this process, on 127.0.0.1 and a free port.

    llama = LlamaCpp("out/smol_shakespeare/smol_shakespeare-f32.gguf")
    llama.greedy(llama.tokenize("ROMEO:"), 20)
"""

import json
import urllib.request

import xllamacpp


class LlamaCpp:
    def __init__(self, file, context: int = 0, threads: int = 1, exact: bool = True):
        """Load `file`; RuntimeError if llama.cpp refuses it. context 0 is the model's own.

        exact turns off its flash attention and keeps the cache in fp32: both cost about 1e-3 nats a token, without
        them it is 1e-6. One thread: a tiny model gains nothing from a second, and beside torch's own loses a lot.
        """
        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx = context
        p.n_parallel = 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.n_gpu_layers = 0
        p.warmup = False
        p.fit_params = False  # or it measures the machine and may choose a shorter context
        p.cache_ram_mib = 0
        p.verbosity = 0
        if exact:
            p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(p)
        # An answer proves that its loop runs: a server dropped before that hangs in its destructor now and then.
        self.greedy([0], 1)

    def post(self, path: str, **body) -> dict:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data if body else None, headers)
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    def properties(self) -> dict:
        """What it understood: chat_template, eos_token, bos_token, n_ctx and more."""
        return self.post("/props")

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; special: text that spells a special token becomes that token."""
        return self.post("/tokenize", content=text, parse_special=special, add_special=True)["tokens"]

    def detokenize(self, ids: list[int]) -> str:
        return self.post("/detokenize", tokens=ids)["content"]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The n likeliest next ids, one after the other; fewer where the model ends the text."""
        return self.post("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: list[int], vocab_size: int, printable: int) -> list[float]:
        """Of each id but the first, its log-probability after those before it, in nats, before any sampling filter.

        The server tells the probabilities of what it generates, not of a prompt. So: one request a position, one token
        generated, the log-probabilities of the whole vocabulary returned. The token chosen is forced to be
        `printable`, the id of an ASCII character, because the server holds back tokens that end inside a character.
        """
        found = []
        for n in range(1, len(ids)):
            reply = self.post(
                "/completion", prompt=ids[:n], n_predict=1, n_probs=vocab_size, temperature=0,
                logit_bias=[[printable, 1000.0]], cache_prompt=True,
            )  # fmt: skip
            likely = reply["completion_probabilities"][0]["top_logprobs"]
            found.append(next(entry["logprob"] for entry in likely if entry["id"] == ids[n]))
        return found

"""
llama.cpp on a GGUF file, for the tests: its tokens, its text and its probabilities. It runs through the xllamacpp
wheel, as llama.cpp's own HTTP server inside this process, on 127.0.0.1 and a free port.

    llama = LlamaCpp("out/smol_shakespeare/smol_shakespeare-f32.gguf")
    llama.greedy(llama.tokenize("ROMEO:"), 20)
"""

import json
import urllib.request

import xllamacpp


class LlamaCpp:
    def __init__(self, file, context: int = 0, threads: int = 1, exact: bool = True):
        """Load `file`; RuntimeError if llama.cpp refuses it. context 0 is the model's own.

        exact turns flash attention off and keeps the cache in fp32: log-probabilities are then right to 1e-6 nats a
        token instead of 1e-3. One thread: a tiny model gains nothing from a second, and loses a lot beside torch's.
        """
        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx = context
        p.n_parallel = 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.n_gpu_layers = 0
        p.warmup = False
        p.fit_params = False  # otherwise it measures the machine's memory and may choose a shorter context
        p.cache_ram_mib = 0
        p.verbosity = 0
        if exact:
            p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(p)
        # An answer shows that the server's loop runs. A server deleted before that hangs in its destructor sometimes.
        self.greedy([0], 1)

    def post(self, path: str, **body) -> dict:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data if body else None, headers)
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    def properties(self) -> dict:
        """What llama.cpp read from the file: chat_template, eos_token, bos_token, n_ctx and more."""
        return self.post("/props")

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; special: text that spells a special token becomes that token."""
        return self.post("/tokenize", content=text, parse_special=special, add_special=True)["tokens"]

    def detokenize(self, ids: list[int]) -> str:
        return self.post("/detokenize", tokens=ids)["content"]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """Up to n next ids, each the likeliest; fewer where the model ends the text."""
        return self.post("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: list[int], vocab_size: int, printable: int) -> list[float]:
        """The log-probability of each id but the first after those before it, in nats, before any sampling filter.

        The server returns the probabilities of what it generates, not those of a prompt. So there is one request a
        position: it generates one token and returns the log-probabilities of the whole vocabulary. The token is forced
        to be `printable`, the id of an ASCII character, because the server holds back tokens that end inside a
        character.
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

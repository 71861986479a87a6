"""
Run llama.cpp on a GGUF file, for the tests: its tokens, its text and its probabilities. The xllamacpp wheel runs
llama.cpp's HTTP server inside this process, on 127.0.0.1 and a free port.

    llama = LlamaCpp("out/smol_shakespeare/smol_shakespeare-f32.gguf")
    llama.greedy(llama.tokenize("ROMEO:"), 20)
"""

import json
import urllib.request

import xllamacpp


class LlamaCpp:
    def __init__(self, file, context: int = 0, threads: int = 1):
        """Load `file`; raise RuntimeError if llama.cpp refuses it. With context=0 the context is the model's own.

        No flash attention and a cache in fp32: log-probabilities are then right to 1e-6 nats per token instead of 1e-3.
        One thread: a tiny model gains nothing from a second one, which would compete with torch's threads.
        """
        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx = context
        p.n_parallel = 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.n_gpu_layers = p.cache_ram_mib = p.verbosity = 0
        p.warmup = False
        p.fit_params = False  # otherwise it measures the machine's memory and may choose a shorter context
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(p)
        self.greedy([0], 1)  # a server deleted before its first answer sometimes hangs in its destructor

    def post(self, path: str, **body) -> dict:
        """Send a request to the server and return its answer."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data if body else None, headers)
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text. With `special`, text that spells a special token becomes that token."""
        return self.post("/tokenize", content=text, parse_special=special, add_special=True)["tokens"]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """Return the next n ids by greedy decoding; fewer if the model ends the text."""
        return self.post("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: list[int], vocab_size: int, printable: int) -> list[float]:
        """Return the log-probability of each id but the first, given those before it, in nats.

        The server returns probabilities only for what it generates. So one request per position generates one token
        with the log-probabilities of the whole vocabulary. That token is forced to be `printable`, the id of an ASCII
        character, because the server holds back tokens that end inside a character.
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

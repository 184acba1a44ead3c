"""What llama.cpp itself computes from a GGUF file, and the files that it quantizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from torch import Tensor

from tensornet_hf.imatrix import Importance


def logits(path: Path, ids: Tensor, adapter: Path | None = None) -> Tensor:
    """Logits of every token, shape `(tokens, vocabulary)`; of an encoder, its hidden states.

    With an adapter, as `--lora` applies it.
    """
    ffi, lib = get_ffi(), get_lib()
    model = Llama(str(path), n_ctx=64, n_threads=1, embedding=True, pooling_type="none")
    if adapter is not None:
        lora = lib.llama_adapter_lora_init(model._model, str(adapter).encode())
        assert lora != ffi.NULL
        found = ffi.new("struct llama_adapter_lora *[]", [lora])
        assert lib.llama_set_adapters_lora(model._ctx, found, 1, ffi.new("float[]", [1.0])) == 0
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for k, token in enumerate(ids.tolist()):
        batch.token[k], batch.pos[k], batch.n_seq_id[k] = token, k, 1
        batch.seq_id[k][0], batch.logits[k] = 0, 1
    assert lib.llama_decode(model._ctx, batch) == 0
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model._model))
    pointer = lib.llama_get_logits(model._ctx)
    if pointer == ffi.NULL:
        vocabulary = lib.llama_model_n_embd(model._model)
        pointer = lib.llama_get_embeddings(model._ctx)
    size = len(ids) * vocabulary
    numbers = torch.frombuffer(bytearray(ffi.buffer(pointer, 4 * size)), dtype=torch.float32)
    lib.llama_batch_free(batch)
    model.close()
    return numbers.reshape(len(ids), vocabulary)


def quantize(
    source: Path,
    destination: Path,
    text: str,
    options: Mapping[str, str],
    importance: Mapping[str, Importance],
    *,
    dry_run: bool = False,
) -> None:
    """Quantize a file by the function behind `llama-quantize --pure --tensor-type-file`.

    The lines of the recipe are read as the program reads them: lower case, whitespace between, `name=type`.
    """
    ffi, lib = get_ffi(), get_lib()
    kept: list[Any] = []  # the library reads these after the call has begun

    def number(kind: str) -> int:
        return int(gguf.GGMLQuantizationType[kind.upper()])

    lines = [line.rsplit("=", 1) for line in text.lower().split()]
    overrides = ffi.new("struct llama_model_tensor_override[]", len(lines) + 1)
    for place, (pattern, kind) in enumerate(lines):
        kept.append(ffi.new("char[]", pattern.encode()))
        overrides[place].pattern, overrides[place].type = kept[-1], number(kind)
    entries = ffi.new("struct llama_model_imatrix_data[]", len(importance) + 1)
    for place, (name, (squares, _)) in enumerate(importance.items()):
        kept += [ffi.new("char[]", name.encode()), ffi.new("float[]", squares.flatten().tolist())]
        entries[place].name, entries[place].data = kept[-2:]
        entries[place].size = squares.numel()
    asked = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    asked.nthread, asked.ftype, asked.pure, asked.dry_run = 1, 15, True, dry_run  # Q4_K_M
    asked.tt_overrides, asked.imatrix = overrides, entries
    for option, kind in options.items():
        name = {
            "--token-embedding-type": "token_embedding_type",
            "--output-tensor-type": "output_tensor_type",
        }
        setattr(asked, name[option], number(kind))
    assert lib.llama_model_quantize(str(source).encode(), str(destination).encode(), asked) == 0


def memory(path: Path, context: int, cache_type: str) -> int:
    """Bytes that llama.cpp allocates besides the weights, read from what it logs about its buffers."""
    ffi, lib = get_ffi(), get_lib()
    lines: list[str] = []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def log(level: int, text: Any, user: Any) -> None:
        lines.append(ffi.string(text).decode(errors="replace"))

    lib.llama_log_set(log, ffi.NULL)
    try:
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        asked = lib.llama_context_default_params()
        asked.n_ctx, asked.n_threads, asked.swa_full = context, 1, False  # as llama-cli asks
        asked.type_k = asked.type_v = int(gguf.GGMLQuantizationType[cache_type.upper()])
        asked.flash_attn_type = 1
        made = lib.llama_init_from_model(model, asked)
        assert made != ffi.NULL
        lib.llama_free(made)
        lib.llama_model_free(model)
    finally:
        lib.llama_log_set(ffi.NULL, ffi.NULL)
    found = re.findall(r"(?:KV|RS|compute) buffer size = *([\d.]+) MiB", "".join(lines))
    return int(sum(map(float, found)) * 2**20)

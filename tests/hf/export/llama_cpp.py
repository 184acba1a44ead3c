"""Numbers that llama.cpp itself computes from a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from torch import Tensor


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

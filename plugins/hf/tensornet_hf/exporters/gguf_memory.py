"""Memory that llama.cpp needs to run a GGUF file, predicted from the metadata of the file.

The sizes are those of one sequence with flash attention (`-np 1 -fa on`), and of prompts that are read in
batches of 512 tokens, which is llama.cpp's default. They agree with what llama.cpp itself allocates on a CPU.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensornet.errors import BudgetError

#: Bits per value of the types that llama.cpp can store keys and values in.
CACHE_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5,
    "iq4_nl": 4.5,
}  # fmt: skip
#: Contexts are rounded up to a multiple of this number of tokens.
_STEP = 256
#: Architectures (llama.cpp's names) whose sliding windows make its cache smaller. For others, such as
#: EXAONE 4, it depends on the version and the number of layers, so that whole contexts are counted.
SLIDING = ("gemma2", "gemma3", "gpt-oss", "olmo2")
#: Tokens in a chunk of Llama 4, in which three of four layers attend.
LLAMA4_CHUNK = 8192
#: Number of tokens of a prompt that are computed at a time (`-ub`).
_BATCH = 512


def check_cache_type(name: str) -> None:
    """Raise ValueError for an unknown type of keys and values."""
    if name not in CACHE_BITS:
        raise ValueError(f"Unknown cache_type {name!r}; choose one of {', '.join(CACHE_BITS)}.")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that llama.cpp needs in addition to the weights.

    Args:
        context: number of tokens in the context.
        cache_type: type of keys and values, a key of `CACHE_BITS`.
        cache: bytes of the keys and values of all tokens.
        states: bytes of the states of recurrent layers, which do not grow with the context.
        buffers: bytes of intermediate results, mostly logits and attention masks.
        runtime: the sizes of the model.
    """

    context: int
    cache_type: str
    cache: int
    states: int
    buffers: int
    runtime: "Runtime"

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.cache + self.states + self.buffers

    def to_dict(self) -> dict[str, int]:
        """Return the bytes of each use, for reports."""
        found = {f"context of {self.context:,} tokens ({self.cache_type})": self.cache}
        if self.states:
            found["recurrent states"] = self.states
        return {**found, "compute buffers": self.buffers}

    def command(self, file: str) -> str:
        """Return the command line that runs a file in this memory."""
        line = f"llama-cli -m {shlex.quote(file)} -c {self.context} -fa on"
        return line if self.cache_type == "f16" else f"{line} -ctk {self.cache_type} -ctv {self.cache_type}"


class Runtime:
    """Sizes of a model that determine how much memory llama.cpp needs.

    Args:
        keys: metadata of the file by name, without the prefix of the architecture.
        sliding: whether each layer attends to a sliding window only.
    """

    def __init__(self, keys: Mapping[str, Any], sliding: Sequence[bool] = ()) -> None:
        self.layers = int(keys["block_count"])
        self.longest = int(keys["context_length"])
        self._keys = keys
        window = int(keys.get("attention.sliding_window", 0))
        self._windows = [window if window and flag else 0 for flag in (*sliding, *[False] * self.layers)]

    def _each(self, name: str, default: Any = 0) -> list[int]:
        """Return an entry that may be a list of one number for each layer."""
        found = self._keys.get(name, default)
        return [int(x) for x in found] if isinstance(found, list | tuple) else [int(found)] * self.layers

    def use(self, context: int, cache_type: str = "f16") -> MemoryUse:
        """Predict the memory for a context.

        Args:
            context: number of tokens.
            cache_type: type of keys and values, a key of `CACHE_BITS`.

        Raises:
            BudgetError: the context is below 1, or longer than that of the model.
            ValueError: an unknown type, or one that llama.cpp cannot use for this model.
        """
        check_cache_type(cache_type)
        if not 0 < context <= self.longest:
            raise BudgetError(
                f"context={context:,} is out of range: the model was trained with contexts of up to "
                f"{self.longest:,} tokens. Choose at most that many."
            )
        keys, cells = self._keys, math.ceil(context / _STEP) * _STEP
        batch = min(context, _BATCH)
        hidden = int(keys["embedding_length"])
        heads = self._each("attention.head_count")
        groups = self._each("attention.head_count_kv", heads)
        attends, recurrent = self._kinds(groups)
        for layer in range(self.layers - int(keys.get("nextn_predict_layers", 0)), self.layers):
            attends[layer] = recurrent[layer] = False  # draft heads, which llama.cpp does not run by itself
        share = hidden // max(*heads, 1)
        key_size = int(keys.get("attention.key_length", share))
        value_size = int(keys.get("attention.value_length", share))
        if "attention.kv_lora_rank" in keys and "attention.key_length_mla" in keys:
            value_size = 0  # latent vectors are stored once; values are a part of them
        if CACHE_BITS[cache_type] not in (16, 32) and (key_size % 32 or value_size % 32):
            raise ValueError(
                f"cache_type={cache_type!r} stores blocks of 32 values, but the heads of this model have "
                f"{key_size} and {value_size}. Choose f16, bf16 or f32."
            )
        length = {0: cells}
        for window in filter(None, self._windows):
            length[window] = math.ceil(min(cells, window + batch) / _STEP) * _STEP
        values = used = 0
        for layer in range(self.layers):
            if attends[layer]:
                used |= 1 << bool(self._windows[layer])
                values += length[self._windows[layer]] * groups[layer] * (key_size + value_size)
        cache = int(values * CACHE_BITS[cache_type] / 8)

        # The allocator reuses memory, so the largest layer and the logits decide; attention masks (float16)
        # exist all the time, and some five hidden states besides.
        masks = 2 * batch * sum(x for window, x in length.items() if used >> bool(window) & 1)
        wide = max(self._each("feed_forward_length"))
        experts, expert = int(keys.get("expert_used_count", 0)), wide
        if "expert_feed_forward_length" in keys:
            expert = int(keys["expert_feed_forward_length"])
            if not keys.get("leading_dense_block_count"):  # no layer is dense
                wide = int(keys.get("expert_shared_feed_forward_length", 0))
        most = max(3 * heads[k] * key_size + 2 * groups[k] * key_size for k in range(self.layers))
        most = max(most, 3 * wide, 3 * experts * expert, 2 * (experts - 1) * hidden)
        logits = 4 * batch * int(keys["vocab_size"])
        largest = max(4 * batch * most, logits if logits > masks else 0)
        rest = 4 * batch * 5 * hidden + largest
        states = self._state_bytes(sum(recurrent))
        if any(recurrent) and "ssm.inner_size" in keys and "full_attention_interval" not in keys:
            # A Mamba layer has its input, seven or so tensors of its inner size, which llama.cpp wants to be
            # twice the hidden size, the B and C of each group, and its new state at the same time.
            mixed = 2 * int(keys.get("ssm.group_count", 0)) * int(keys["ssm.state_size"])
            each = 15 * hidden + max(2 * mixed, 4 * mixed - hidden) + int(keys.get("ssm.time_step_rank", 0))
            rest = max(rest, 4 * batch * each + states // sum(recurrent))
        return MemoryUse(context, cache_type, cache, states, masks + rest, self)

    def _kinds(self, groups: Sequence[int]) -> tuple[list[bool], list[bool]]:
        """Return for each layer whether it has keys and values, and whether it has a recurrent state."""
        keys = self._keys
        attends = [x > 0 for x in groups]
        if (shared := int(keys.get("attention.shared_kv_layers", 0))) > 0:
            attends = [k < self.layers - shared for k in range(self.layers)]
        if not {"ssm.state_size", "shortconv.l_cache"} & keys.keys():
            return attends, [False] * self.layers
        if (every := int(keys.get("full_attention_interval", 0))) > 0:
            attends = [(k + 1) % every == 0 for k in range(self.layers)]
        return attends, [not x for x in attends]

    def _state_bytes(self, layers: int) -> int:
        """Return the bytes of recurrent states, which llama.cpp stores in float32."""
        keys = self._keys
        if (taps := int(keys.get("shortconv.l_cache", 0))) > 0:
            return 4 * layers * int(keys["embedding_length"]) * (taps - 1)
        inner, state = int(keys.get("ssm.inner_size", 0)), int(keys.get("ssm.state_size", 0))
        mixed = inner + 2 * int(keys.get("ssm.group_count", 0)) * state
        return 4 * layers * (max(int(keys.get("ssm.conv_kernel", 0)) - 1, 0) * mixed + state * inner)

    def longest_fitting(self, available: int, cache_type: str) -> int:
        """Return the longest context that needs at most `available` bytes, or 0 if none fits."""
        low, high = 0, math.ceil(self.longest / _STEP)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.use(min(middle * _STEP, self.longest), cache_type).total <= available
            low, high = (middle, high) if fits else (low, middle - 1)
        return min(low * _STEP, self.longest)

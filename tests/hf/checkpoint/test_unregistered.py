"""What happens where the plugin was not imported: a warning says what to do before saving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import tensornet as tn
from tensornet.nn import extension as extensions
from tensornet.registry import Registry


class Model(nn.Module):
    """Saves itself in its own way, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def save_pretrained(self, folder: str) -> None: ...


@pytest.fixture(autouse=True)
def no_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_EXTENSIONS", Registry("model extension", error=TypeError))


class Saving(extensions.ModelExtension):
    def layers_replaced(self, model: nn.Module) -> bool:
        return True


def test_a_model_that_nobody_describes_is_said() -> None:
    model = Model()
    with pytest.warns(UserWarning, match="tensornet_hf.save"):
        tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    tn.decompress(model)  # no warning: its layers are dense again
    extensions.register_extension(Saving())
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)


@pytest.mark.slow
def test_importing_the_plugin_after_compressing_is_early_enough(tmp_path: Path) -> None:
    code = f"""
import copy, warnings, torch, transformers, tensornet as tn
dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_layer=1, n_embd=24, n_head=2, vocab_size=101, n_positions=16, bos_token_id=1, eos_token_id=2)).eval()
model, part = copy.deepcopy(dense), copy.deepcopy(dense)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tn.compress(model, tn.CompressionConfig(target_modules="all", topology="mpo"), progress=False)
assert any("tensornet_hf.save" in str(x.message) for x in said)
tn.compress(part.transformer.h[0], tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
import tensornet_hf as th
ids = torch.arange(6)[None]
for name, each in dict(whole=model, part=part).items():
    th.save(each, {str(tmp_path)!r} + "/" + name)
    torch.testing.assert_close(th.load({str(tmp_path)!r} + "/" + name)(ids).logits, each(ids).logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)

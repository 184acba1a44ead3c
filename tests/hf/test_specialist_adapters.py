"""Specialists as a method of PEFT: the calls of PEFT, on one shared set of cores."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.peft import SpecialistsConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's use of it
IDS = torch.arange(30).reshape(3, 10)


def trunk() -> PreTrainedModel:
    return th.load(th.embedded.gpt2_path()).eval()


def randomize(model: peft.PeftModel, name: str) -> None:
    for core in th.PretrainedSpecialists(model.get_base_model()).tensors(name).values():
        torch.nn.init.normal_(core, std=0.2)


@torch.no_grad()
def logits(model: torch.nn.Module, **options: object) -> Tensor:
    return model(input_ids=IDS, **options).logits  # type: ignore[no-any-return]


@pytest.fixture
def adapted() -> peft.PeftModel:
    config = {"r": 4, "pool": "shape"}
    model = peft.get_peft_model(trunk(), SpecialistsConfig(**config), adapter_name="law").eval()
    randomize(model, "law")
    model.add_adapter("code", SpecialistsConfig(**config))
    randomize(model, "code")
    return model


def test_adapters_are_added_chosen_mixed_and_deleted(adapted: peft.PeftModel) -> None:
    base = logits(trunk())
    law = logits(adapted)
    adapted.set_adapter("code")
    code = logits(adapted)
    assert not torch.equal(law, base)
    assert not torch.equal(law, code)
    names = ["law", "code", "__base__"]
    mixed = logits(adapted, adapter_names=names)
    for row, expected in enumerate((law, code, base)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(adapted), code)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    adapted.set_adapter("law")
    adapted.delete_adapter("code")
    assert torch.equal(logits(adapted), law)
    s = th.PretrainedSpecialists(adapted.get_base_model())
    assert s.names == ["law"]
    with s.use("law"):
        assert torch.equal(logits(adapted.get_base_model()), law)


def test_a_second_adapter_trains_alone(adapted: peft.PeftModel) -> None:
    law = logits(adapted)
    adapted.set_adapter("code")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(".specialists.code." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    adapted.set_adapter("law")
    assert torch.equal(logits(adapted), law)
    # The first adapter trains the shared cores, too.
    first = peft.get_peft_model(trunk(), SpecialistsConfig(r=4))
    assert any(".shared_cores." in name and p.requires_grad for name, p in first.named_parameters())
    assert not any(".base_layer." in name and p.requires_grad for name, p in first.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
)
def test_each_row_is_generated_with_its_adapter(adapted: peft.PeftModel, options: dict[str, Any]) -> None:
    names = ["law", "code"]
    fixed = {"max_new_tokens": 3, "pad_token_id": 0, **options}
    together = adapted.generate(input_ids=IDS[:2], adapter_names=names, **fixed)
    alone = []
    for row, name in zip(IDS, names, strict=False):
        adapted.set_adapter(name)
        alone.append(adapted.generate(input_ids=row[None], **fixed))
    assert torch.equal(together, torch.cat(alone))


def test_adapters_are_saved_and_loaded_by_peft(adapted: peft.PeftModel, tmp_path: Path) -> None:
    law = logits(adapted)
    adapted.set_adapter("code")
    code = logits(adapted)
    adapted.save_pretrained(str(tmp_path))
    back = peft.PeftModel.from_pretrained(trunk(), str(tmp_path / "law"), adapter_name="law").eval()
    back.load_adapter(str(tmp_path / "code"), "code")
    assert torch.equal(logits(back), law)
    back.set_adapter("code")
    assert torch.equal(logits(back), code)
    folder = th.PretrainedSpecialists(back.get_base_model()).save(tmp_path / "folder")
    s = th.load_specialists(folder)
    for name, expected in (("law", law), ("code", code)):
        with s.use(name):
            assert torch.equal(logits(s.model), expected)

    other = peft.get_peft_model(trunk(), SpecialistsConfig(r=4, pool="shape"), adapter_name="other")
    th.PretrainedSpecialists(other.get_base_model()).shared_parameters()[0].data += 1
    other.save_pretrained(str(tmp_path / "others"))
    with pytest.raises(TargetError, match="other shared cores"):
        back.load_adapter(str(tmp_path / "others" / "other"), "other")
    assert torch.equal(logits(back), code)


def test_specialists_of_a_compressed_trunk_are_adapters() -> None:
    model = trunk()
    config = tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), method="nearest")
    tn.compress(model, config, progress=False)
    before = logits(model)
    adapted = peft.get_peft_model(model, SpecialistsConfig(r=4, target_modules=["c_fc"])).eval()
    assert torch.equal(logits(adapted), before)
    randomize(adapted, "default")
    assert not torch.equal(logits(adapted), before)
    assert len(th.PretrainedSpecialists(adapted.get_base_model()).layers) == 4


def test_bad_adapters_are_refused(adapted: peft.PeftModel) -> None:
    law = logits(adapted)
    with pytest.raises(ValueError, match="the same r"):
        adapted.add_adapter("perl", SpecialistsConfig(r=8, pool="shape"))
    with pytest.raises(TargetError, match="no specialist named 'perl'"):
        logits(adapted, adapter_names=["law", "perl", "law"])
    with pytest.raises(ValueError, match="exceeds the shorter side"):
        peft.get_peft_model(trunk(), SpecialistsConfig(r=1000))
    with pytest.raises(TargetError, match="lose the other specialists"):
        adapted.merge_adapter(["law"])
    assert torch.equal(logits(adapted), law)

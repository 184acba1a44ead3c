"""Fine-tuned models as small changes of one base: exact at full precision, small otherwise, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import BudgetError, DestinationError, FormatError, TargetError
from tensornet_hf import packing
from tensornet_hf.embedded import gpt2_path, heldout_text
from tensornet_moe.changed_layers import changes_of

# PEFT reads an attribute that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.randint(900, (4, 24), generator=torch.Generator().manual_seed(0))
#: A plan for which every change is stored in the dtype of the model.
EXACT = tn.CompressionConfig(formats=("float",), topology="dense", bits_per_weight=33)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tune the package's GPT-2 for a few steps on two texts, `upper` and `digits`."""
    folder = tmp_path_factory.mktemp("models")
    texts = {"upper": heldout_text()[:8000].upper(), "digits": heldout_text()[:8000].replace("e", "3")}
    for seed, (name, text) in enumerate(texts.items()):
        (folder / f"{name}.txt").write_text(text)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(gpt2_path())
        ids = torch.tensor(th.text.load_tokenizer(gpt2_path())(text)["input_ids"])
        windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        for step in range(12):
            batch = windows[4 * step % len(windows) :][:4]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        th.save(model, folder / name, source=gpt2_path())
    return folder


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def pack(
    models: Path,
    destination: Path,
    *names: str,
    bits: float = 3.0,
    base: Path | None = None,
    **options: object,
) -> th.PackReport:
    """Pack models in integers alone, unless the options say otherwise."""
    surveys = None if options or base is not None else models / "surveys"
    options = options or {"formats": ("int8:row", "int4:row", "int2:row", "int1:row"), "topology": "dense"}
    return th.pack(
        gpt2_path() if base is None else base,
        destination,
        {name: models / name for name in names},
        tn.CompressionConfig(bits_per_weight=bits, **options),
        calibration={name: models / f"{name}.txt" for name in names},
        calibration_tokens=1024,
        surveys=surveys,
    )


@pytest.fixture(scope="module")
def packed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack `upper`; tests copy the folder before they change it."""
    folder = tmp_path_factory.mktemp("packed") / "pack"
    pack(models, folder, "upper")
    return folder


@pytest.mark.slow
def test_by_default_half_a_bit_is_enough(models: Path, tmp_path: Path) -> None:
    report = pack(models, tmp_path / "pack", "upper", bits=0.5, topology="auto")
    assert report.models["upper"].bits_per_weight <= 0.5
    s = th.load_specialists(tmp_path / "pack")
    wanted = logits(th.load(models / "upper"))
    with s.use("upper"):
        assert divergence(wanted, logits(s.model)) < 0.2 * divergence(wanted, logits(th.load(gpt2_path())))


def test_changes_in_full_precision_give_the_fine_tuned_model(models: Path, tmp_path: Path) -> None:
    text = str(models / "upper.txt")
    th.pack(gpt2_path(), tmp_path / "pack", {"upper": models / "upper"}, EXACT, calibration=text)
    s = th.load_specialists(tmp_path / "pack")
    wanted, base = logits(th.load(models / "upper")), logits(th.load(gpt2_path()))
    assert divergence(wanted, base) > 1e-3
    with s.use("upper"):
        torch.testing.assert_close(logits(s.model), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(s.model), base, rtol=0, atol=0)
    s.unpack("upper", tmp_path / "alone")
    torch.testing.assert_close(logits(th.load(tmp_path / "alone")), wanted, rtol=1e-4, atol=1e-4)
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    torch.testing.assert_close(logits(ordinary), wanted, rtol=1e-4, atol=1e-4)


def test_two_models_by_row_and_mixed(models: Path, tmp_path: Path) -> None:
    report = pack(models, tmp_path / "pack", "upper", "digits")
    assert all(x.bits_per_weight <= 3 for x in report.models.values())
    s = th.load_specialists(tmp_path / "pack")
    assert s.bytes()["upper"] == report.models["upper"].bytes
    alone, base = {}, logits(th.load(gpt2_path()))
    for name in ("upper", "digits"):
        with s.use(name):
            alone[name] = logits(s.model)
        wanted = logits(th.load(models / name))
        assert divergence(wanted, alone[name]) < 0.1 * divergence(wanted, base)
    with s.use(["digits", None, "upper", "digits"]):
        rows = logits(s.model)
    for k, wanted in enumerate((alone["digits"], base, alone["upper"], alone["digits"])):
        torch.testing.assert_close(rows[k], wanted[k], rtol=1e-4, atol=1e-4)
    with s.use({"upper": torch.tensor([1.0, 0.0, 1.0, 0.0])}):
        rows = logits(s.model)
    for k, wanted in enumerate((alone["upper"], base, alone["upper"], base)):
        torch.testing.assert_close(rows[k], wanted[k], rtol=1e-4, atol=1e-4)


def test_a_model_added_later_changes_no_file_of_the_others(
    models: Path, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "pack")
    before = (tmp_path / "pack" / "upper.safetensors").read_bytes()
    report = pack(models, tmp_path / "pack", "digits")
    assert report.others == ("upper",)
    assert (tmp_path / "pack" / "upper.safetensors").read_bytes() == before
    assert th.load_specialists(tmp_path / "pack").names == ["upper", "digits"]
    assert th.load_specialists(tmp_path / "pack", names=["digits"]).names == ["digits"]


def test_a_rounded_base_is_repaired(models: Path, tmp_path: Path) -> None:
    config = tn.CompressionConfig(formats=("int4",), method="nearest", target_modules="all")
    th.compress_folder(gpt2_path(), tmp_path / "small", config)
    pack(models, tmp_path / "pack", "upper", base=tmp_path / "small")
    s = th.load_specialists(tmp_path / "pack")
    wanted = logits(th.load(models / "upper"))
    with s.use("upper"):
        assert divergence(wanted, logits(s.model)) < 0.2 * divergence(
            wanted, logits(th.load(tmp_path / "small"))
        )


def test_factors_lower_the_divergence(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one bit, changes that are only rounded pull the model back to its base."""
    found = {}
    for name, powers in (("rounded", (0.0,)), ("scaled", packing._POWERS)):
        monkeypatch.setattr(packing, "_POWERS", powers)
        report = pack(models, tmp_path / name, "upper", bits=1.5)
        measured = report.models["upper"].measured
        assert measured is not None
        assert measured.kl_mean is not None
        s = th.load_specialists(tmp_path / name)
        found[name] = measured.kl_mean, max(x.scale for x in changes_of(s)["upper"].values())
    assert found["rounded"][1] == 1.0
    assert found["scaled"][1] > 1.0
    assert found["scaled"][0] < 0.9 * found["rounded"][0]


@pytest.mark.slow
def test_one_budget_for_all_models(models: Path, tmp_path: Path) -> None:
    """`weak` differs from the base half as much as `upper`, so it gets fewer bytes."""
    base, half = th.load(gpt2_path()), th.load(models / "upper")
    with torch.no_grad():
        for parameter, other in zip(half.parameters(), base.parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    th.save(half, tmp_path / "weak", source=gpt2_path())
    fine, text = {"upper": models / "upper", "weak": tmp_path / "weak"}, models / "upper.txt"
    options = {"formats": ("int8:row", "int4:row", "int2:row", "int1:row"), "topology": "dense"}
    found, surveys = {}, tmp_path / "surveys"
    for name, budget in (("each", {"max_bytes": 300_000}), ("all", {"max_bytes": 600_000})):
        config = tn.CompressionConfig(**options, **budget)
        found[name] = th.pack(
            gpt2_path(),
            tmp_path / name,
            fine,
            config,
            calibration=text,
            calibration_tokens=1024,
            shared_budget=name == "all",
            surveys=surveys,
        )
        assert sorted(x.name for x in surveys.iterdir()) == ["upper.safetensors", "weak.safetensors"]
    each, together = (found[x].models for x in ("each", "all"))
    assert all(x.bytes <= 300_000 for x in each.values())
    assert sum(x.bytes for x in together.values()) <= 600_000
    assert together["weak"].bytes < 0.9 * together["upper"].bytes
    sums = {name: sum(x.measured.kl_mean for x in report.models.values()) for name, report in found.items()}
    assert sums["all"] < sums["each"]
    assert each["upper"].base.kl_mean > 2 * each["weak"].base.kl_mean
    few = tn.CompressionConfig(**options, max_bytes=40_000)
    others = {"weak": models / "upper"}
    with torch.no_grad():
        base.transformer.ln_f.weight.mul_(1.01)
    th.save(base, tmp_path / "norms", source=gpt2_path())
    for given, config, more, error, message in (
        (fine, few, {"surveys": surveys}, BudgetError, "and the smallest changes of matrices"),
        (others, few, {"surveys": surveys}, TargetError, "survey was made for another model"),
        ({"norms": tmp_path / "norms"}, few, {"shared_budget": True}, ValueError, "it changes no matrix"),
        (fine, few, {"surveys": text}, DestinationError, "is no folder for surveys"),
    ):
        options = {"calibration": text, "calibration_tokens": 1024, **more}
        with pytest.raises(error, match=message):
            th.pack(gpt2_path(), tmp_path / "none", given, config, **options)
    assert not (tmp_path / "none").exists()


def test_a_loaded_pack_moves_to_other_dtypes_and_devices(models: Path, packed: Path) -> None:
    s = th.load_specialists(packed)
    assert not [name for name, x in s.model.named_buffers() if x.is_meta]
    with s.use("upper"):
        before = logits(s.model)
        torch.testing.assert_close(logits(s.model.to("cpu")), before, rtol=0, atol=0)


def test_a_model_keeps_its_own_tokenizer_and_settings(models: Path, tmp_path: Path) -> None:
    """As of a model that was fine-tuned to follow instructions: a chat template, and another last token."""
    shutil.copytree(models / "upper", tmp_path / "fine")
    tokenizer = th.text.load_tokenizer(tmp_path / "fine")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "fine")
    GenerationConfig(eos_token_id=7).save_pretrained(tmp_path / "fine")
    text = models / "upper.txt"
    pack(models, tmp_path / "pack", "upper")
    th.pack(gpt2_path(), tmp_path / "pack", {"chat": tmp_path / "fine"}, EXACT, calibration=text)
    pack(models, tmp_path / "pack", "digits")
    s = th.load_specialists(tmp_path / "pack")
    assert list(s.tokenizers) == ["chat"]
    assert th.text.load_tokenizer(s.tokenizers["chat"]).chat_template == tokenizer.chat_template
    for name, wanted in (("chat", tokenizer.chat_template), ("upper", None)):
        s.unpack(name, tmp_path / f"alone-{name}")
        assert th.text.load_tokenizer(tmp_path / f"alone-{name}").chat_template == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "alone-chat").generation_config.eos_token_id == 7
    s.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "chat" / "generation_config.json").is_file()
    s.remove("chat")
    s.save(tmp_path / "without")
    assert not (tmp_path / "without" / "chat").exists()


def test_a_lora_adapter_is_a_fine_tuned_model(models: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        th.load(gpt2_path()), peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    text = str(models / "upper.txt")
    report = th.pack(gpt2_path(), tmp_path / "pack", {"law": tmp_path / "adapter"}, EXACT, calibration=text)
    assert sum(report.models["law"].layers.values()) == 4
    s = th.load_specialists(tmp_path / "pack")
    with s.use("law"):
        torch.testing.assert_close(logits(s.model), logits(adapted), rtol=1e-4, atol=1e-4)


def test_another_base_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_path(), tmp_path / "other")
    other = th.load(gpt2_path())
    torch.manual_seed(0)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.02)
    th.save(other, tmp_path / "random", source=gpt2_path())
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        )
    )
    llama.save_pretrained(tmp_path / "llama")
    cases = {
        "random": "cosine of both models' weights is",
        "llama": "is a LlamaForCausalLM, but the base is a GPT2LMHeadModel",
        "other": "is equal to its base",
    }
    for name, message in cases.items():
        with pytest.raises(TargetError, match=message):
            th.pack(gpt2_path(), tmp_path / "pack", {name: tmp_path / name})
    assert not (tmp_path / "pack").exists()


def test_bad_arguments_are_refused(models: Path, tmp_path: Path) -> None:
    for given, error, message in (
        ({}, ValueError, "pack needs fine-tuned models"),
        ({"shared": models / "upper"}, ValueError, "cannot be named 'shared'"),
        ({"a": models / "upper", "A": models / "digits"}, ValueError, "already is a specialist named 'A'"),
        ({"a": models / "none"}, FormatError, "none"),
    ):
        with pytest.raises(error, match=message):
            th.pack(gpt2_path(), tmp_path / "pack", given)
    with pytest.raises(ValueError, match="needs a text for each of a"):
        th.pack(gpt2_path(), tmp_path / "pack", {"a": models / "upper"}, calibration={"b": "x.txt"})
    config = tn.CompressionConfig(max_bytes=100)
    with pytest.raises(BudgetError, match="stored as they are take"):
        th.pack(gpt2_path(), tmp_path / "pack", {"a": models / "upper"}, config)


def test_a_changed_base_or_file_is_refused(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "pack")
    base = th.load(gpt2_path())
    with torch.no_grad():
        base.transformer.wte.weight[3] += 1
    with pytest.raises(TargetError, match="another trunk"):
        th.load_specialists(tmp_path / "pack", base)
    description = json.loads((tmp_path / "pack" / "specialists.json").read_text())
    first = next(iter(description["changes"]["upper"]))
    del description["changes"]["upper"][first]
    (tmp_path / "pack" / "specialists.json").write_text(json.dumps(description))
    with pytest.raises(FormatError, match="belongs to no change"):
        th.load_specialists(tmp_path / "pack")


def test_packed_models_are_neither_trained_nor_exported_as_adapters(packed: Path, tmp_path: Path) -> None:
    s = th.load_specialists(packed)
    with pytest.raises(TargetError, match="fine-tuned models, which are not trained here"):
        s.add("law")
    for rank in (None, 4):
        with pytest.raises(TargetError, match=r"layer .*: .*unpack\(name, folder\)"):
            s.export("upper", tmp_path / "adapter", rank=rank)
    assert not (tmp_path / "adapter").exists()
    s.remove("upper")
    assert s.names == []


def test_a_packed_model_becomes_a_file_of_its_own(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    s, file = th.load_specialists(packed), tmp_path / "alone.gguf"
    with s.use("upper"):
        wanted = logits(s.model)
    assert s.unpack("upper", file) == file
    config = AutoConfig.from_pretrained(gpt2_path())
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="alone.gguf", config=config)
    torch.testing.assert_close(logits(alone), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(DestinationError, match="exists already"):
        s.unpack("upper", file)
    s.unpack("upper", file, force=True)
    with pytest.raises(ValueError, match="Unknown export target 'none'"):
        s.unpack("upper", tmp_path / "other", target="none")
    with pytest.raises(TargetError, match="no compressed layers"):  # targets for integers alone
        s.unpack("upper", tmp_path / "other", target="mlx")
    assert not (tmp_path / "other").exists()


def test_changes_of_linear_layers_become_adapters(models: Path, tmp_path: Path) -> None:
    """Two matrices change: one by a low rank, and one by noise."""
    peft = pytest.importorskip("peft")
    fine, generator = th.load(gpt2_path()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for k, rank in enumerate((2, 999)):
            weight = fine.transformer.h[k].mlp.c_fc.weight
            left = torch.randn(len(weight), min(rank, len(weight)), generator=generator)
            weight.add_(0.02 * left @ torch.randn(left.shape[1], weight.shape[1], generator=generator))
    th.save(fine, tmp_path / "fine", source=gpt2_path())
    text = models / "upper.txt"
    low = tn.CompressionConfig(formats=("float",), topology="low_rank", bits_per_weight=6)
    th.pack(gpt2_path(), tmp_path / "low", {"fine": tmp_path / "fine"}, low, calibration=text)
    th.pack(gpt2_path(), tmp_path / "full", {"fine": tmp_path / "fine"}, EXACT, calibration=text)
    s = th.load_specialists(tmp_path / "low")
    s.export("fine", tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(th.load(gpt2_path()), tmp_path / "adapter")
    with s.use("fine"):
        torch.testing.assert_close(logits(adapted), logits(s.model), rtol=1e-3, atol=1e-3)
    s = th.load_specialists(tmp_path / "full")
    with pytest.raises(TargetError, match="its change is not of low rank"):
        s.export("fine", tmp_path / "other")
    s.export("fine", tmp_path / "other", rank=2)
    name = "transformer.h.0.mlp.c_fc"
    left, right = s.layers[name].factors("fine", 2)
    exact = fine.get_submodule(name).weight - s.model.get_submodule(name).base_layer.weight
    torch.testing.assert_close((left @ right).T, exact, rtol=1e-3, atol=1e-4)
    with pytest.raises(BudgetError, match="rank must be"):
        s.export("fine", tmp_path / "third", rank=0)

"""`Trainer` trains, checkpoints and resumes a compressed model like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from torch import Tensor
from transformers import Trainer, TrainingArguments

import tensornet_hf as th


class Sentences(torch.utils.data.Dataset):
    """The inputs of an architecture, row by row."""

    def __init__(self, name: str) -> None:
        self.columns = ARCHITECTURES[name].inputs(labels=True, rows=8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        save_total_limit=2,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5_relu", "bert", "vit"])
def test_trains_a_loaded_model(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.compressed.save_pretrained(tmp_path / "model")
    model = th.load(tmp_path / "model")
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, arguments(tmp_path / "run", max_steps=6), train_dataset=Sentences(name))
    before = model(**architecture.inputs(labels=True, rows=8)).loss.item()
    trainer.train()
    model.eval()
    assert model(**architecture.inputs(labels=True, rows=8)).loss.item() < before
    still = [n for n, p in model.named_parameters() if ".core_" in n and torch.equal(p, start[n])]
    assert still == []
    trainer.save_model(str(tmp_path / "trained"))
    torch.testing.assert_close(
        logits(th.load(tmp_path / "trained"), architecture), logits(model, architecture), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_resuming_gives_the_same_model(tmp_path: Path) -> None:
    results = []
    for interrupted in (False, True):
        model = ARCHITECTURES["gpt2"].compressed
        folder = tmp_path / str(interrupted)
        steps = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "constant"}
        if interrupted:
            first = Trainer(
                model, arguments(folder, **{**steps, "max_steps": 2}), train_dataset=Sentences("gpt2")
            )
            first.train()
            model = ARCHITECTURES["gpt2"].compressed
        trainer = Trainer(model, arguments(folder, **steps), train_dataset=Sentences("gpt2"))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if interrupted else None)
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

"""Does MPOE reach the accuracy of Switch and dense models on GLUE, as in the paper?

Hub checkpoints are fine-tuned in all three forms. One command for each row; each writes one JSON file into
`--out`, and what is there is not run again:

    pip install "tensornet-torch[hf]" datasets
    python benchmarks/paper/finetune.py t5-base --task sst2 --form dense
    python benchmarks/paper/finetune.py t5-base --task sst2 --form switch
    python benchmarks/paper/finetune.py t5-base --task sst2 --form mpoe --mask 0.5
    python benchmarks/paper/finetune.py gpt2 --task mrpc --form mpoe

Both kinds of model see the task as text: T5 reads the sentences and writes the label as a word, GPT-2
continues the sentences with it. The answer is the label word with the highest likelihood. All forms start
from the same checkpoint through `th.upcycle` and get the same batches, steps and tuning: each rate of the
grid is tried with the first seed and judged on a tenth of the training part; the best is used for all
seeds and judged on the validation part of GLUE.

It needs the hub, and a GPU for models of that size. `--data FILE` reads JSON lines with the columns of the
task instead of the hub; `--toy` shrinks everything and runs offline, on a model that ships with the package:

    python benchmarks/paper/finetune.py toy-t5 --task sst2 --form mpoe --toy
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tensornet_hf as th
import tensornet_moe as tm
from tensornet_hf.embedded import gpt2_path, t5_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import provenance

TOY_MODELS = {"toy-t5": t5_path, "toy-gpt2": gpt2_path}
TOY_DATA = Path(__file__).with_name("toy.jsonl")
FORMS = ("dense", "switch", "mpoe")
IGNORED = -100


#: Columns of the sentences and label words, in the order of the labels, of the tasks of GLUE.
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("wrong", "right")),
    "sst2": (("sentence",), ("bad", "good")),
    "mrpc": (("sentence1", "sentence2"), ("no", "yes")),
    "qqp": (("question1", "question2"), ("no", "yes")),
    "qnli": (("question", "sentence"), ("yes", "no")),
    "rte": (("sentence1", "sentence2"), ("yes", "no")),
    "wnli": (("sentence1", "sentence2"), ("no", "yes")),
    "mnli": (("premise", "hypothesis"), ("yes", "maybe", "no")),
}

Example = tuple[str, int]


def examples(name: str, data: Path | None, *, seed: int = 0) -> dict[str, list[Example]]:
    """Read a task from the hub or a local file, as pairs of text and label in three parts.

    A tenth of the training part is for tuning. Of a local file a fifth is for the test.
    """
    columns, _ = TASKS[name]
    if data is not None:
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
        test, train = rows[::5], [row for i, row in enumerate(rows) if i % 5]
    else:
        import datasets

        loaded = datasets.load_dataset("nyu-mll/glue", name)
        judged = "validation_matched" if name == "mnli" else "validation"
        train, test = list(loaded["train"]), list(loaded[judged])

    def pair(row: dict[str, Any]) -> Example:
        return " ".join([name, *(f"{column}: {row[column]}" for column in columns)]), int(row["label"])

    found = [pair(row) for row in train]
    random.Random(seed).shuffle(found)
    tuning = max(1, len(found) // 10)
    return {"train": found[tuning:], "tune": found[:tuning], "test": [pair(row) for row in test]}


class Encoder:
    """Encoder of examples to batches for a model that writes the label word.

    Args:
        tokenizer: of the model.
        words: label words.
        decoder_only: whether the word continues the text, or is a separate target.
        length: longest text in tokens; the end of longer ones is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], *, decoder_only: bool, length: int
    ) -> None:
        self.tokenizer, self.decoder_only, self.length = tokenizer, decoder_only, length
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        before = " " if decoder_only else ""
        self.words = [[*tokenizer.encode(before + word, add_special_tokens=False), *end] for word in words]
        assert len(set(map(tuple, self.words))) == len(words), (
            f"The tokenizer reads {words} as the same word."
        )

    def batch(self, found: Sequence[Example]) -> dict[str, Tensor]:
        """Encode examples as inputs of the model, with all labels but the label word ignored."""
        texts = [self.tokenizer.encode(text)[: self.length] for text, _ in found]
        targets = [self.words[label] for _, label in found]
        if self.decoder_only:
            ids = [[*text, *word] for text, word in zip(texts, targets, strict=True)]
            labels = [[IGNORED] * len(text) + word for text, word in zip(texts, targets, strict=True)]
        else:
            ids, labels = texts, targets
        return {
            "input_ids": _padded(ids, self.tokenizer.pad_token_id or 0),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": _padded(labels, IGNORED),
        }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


@torch.no_grad()
def accuracy(model: nn.Module, encoder: Encoder, found: Sequence[Example], batch: int) -> float:
    """Return the fraction of examples whose label word is the likeliest of all label words."""
    model.eval()
    right, device = 0, next(model.parameters()).device
    for start in range(0, len(found), batch):
        part = found[start : start + batch]
        scores = []
        for label in range(len(encoder.words)):
            inputs = {k: v.to(device) for k, v in encoder.batch([(text, label) for text, _ in part]).items()}
            logits, labels = model(**inputs).logits, inputs["labels"]
            if encoder.decoder_only:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            scores.append(-loss.view_as(labels).sum(-1))
        guess = torch.stack(scores).argmax(0).tolist()
        right += sum(g == label for g, (_, label) in zip(guess, part, strict=True))
    return right / len(found)


def load(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase, bool]:
    """Load a checkpoint by hub id or folder; return model, tokenizer, and True for a decoder-only model."""
    where = str(TOY_MODELS[name]()) if name in TOY_MODELS else name
    encoder_decoder = AutoConfig.from_pretrained(where).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(where), AutoTokenizer.from_pretrained(where), not encoder_decoder


def run(
    options: argparse.Namespace, rate: float, seed: int, parts: dict[str, list[Example]]
) -> dict[str, Any]:
    """Fine-tune once and judge on both parts."""
    set_seed(seed)
    model, tokenizer, decoder_only = load(options.model)
    if options.form != "dense":
        form: dict[str, Any] = {"sites": 1, "shared": "none"} if options.form == "switch" else {}
        form = {"sites": options.sites, "noise": 0.01, **form}
        th.upcycle(model, th.MoEConfig(num_experts=options.experts, seed=options.seeds[0], **form))
    _, words = TASKS[options.task]
    encoder = Encoder(tokenizer, words, decoder_only=decoder_only, length=options.length)
    callbacks = []
    if options.mask and options.form == "mpoe":
        callbacks.append(th.GradientMaskCallback(p=options.mask, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=rate,
            num_train_epochs=options.epochs,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            lr_scheduler_type="linear",
            warmup_steps=options.warmup,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            seed=seed,
            data_seed=seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=options.toy,
        )
        trainer = Trainer(
            model, arguments, train_dataset=parts["train"], data_collator=encoder.batch, callbacks=callbacks
        )
        trained = trainer.train()
    return {
        "rate": rate,
        "seed": seed,
        "steps": trained.global_step,
        "train_loss": trained.training_loss,
        "tune": accuracy(model, encoder, parts["tune"], options.batch),
        "test": accuracy(model, encoder, parts["test"], options.batch),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_parameters": sum(
            p.numel()
            for layer in model.modules()
            if isinstance(layer, tm.SharedCoreMoE)
            for p in layer.experts.parameters()
        ),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run one row and write its file."""
    options = parse(arguments)
    mask = f"-mask{options.mask:g}" if options.mask and options.form == "mpoe" else ""
    name = f"{Path(options.model).name}-{options.task}-{options.form}{mask}"
    file: Path = options.out / f"{name}.json"
    if file.is_file():
        print(f"{file} is there already; move it away to run this row again.")
        return file
    parts = examples(options.task, options.data)
    tried = [run(options, rate, options.seeds[0], parts) for rate in options.rates]
    best = max(tried, key=lambda found: found["tune"])
    runs = [best, *(run(options, best["rate"], seed, parts) for seed in options.seeds[1:])]
    scores = [found["test"] for found in runs]
    result = {
        "row": name,
        **provenance(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "examples": {part: len(found) for part, found in parts.items()},
        "tried": tried,
        "runs": runs,
        "accuracy": statistics.mean(scores),
        "accuracy_spread": statistics.stdev(scores) if len(scores) > 1 else None,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{name}: accuracy {result['accuracy']:.4f} at rate {best['rate']:g}, "
        f"{best['parameters']:,} parameters, {best['expert_parameters']:,} of them in experts"
    )
    return file


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="hub id or folder, for example t5-base or gpt2; toy-t5 or toy-gpt2")
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sites", type=int, default=5, help="cores of a matrix")
    parser.add_argument("--mask", type=float, default=0.0, help="probability of the gradient mask, for mpoe")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="longest text in tokens")
    parser.add_argument("--data", type=Path, help="JSON lines with the task's columns and label, not the hub")
    parser.add_argument("--out", type=Path, default=Path("paper"), help="folder of the results")
    parser.add_argument("--toy", action="store_true", help="two steps on a local file, to test the script")
    options = parser.parse_args(arguments)
    if options.toy:
        options.data = options.data or TOY_DATA
        options.rates, options.seeds, options.steps, options.warmup = options.rates[:2], [0, 1], 2, 0
        options.batch, options.experts, options.sites = 4, 2, 3
    return options


if __name__ == "__main__":
    main()

"""How were the two small models that ship with the package made?

They are trained on the King James Bible as plain text:

* a GPT-2 of 0.94 million parameters (4 layers, width 128, context 128, byte-level BPE of 1,024 tokens);
* a T5 of 0.52 million parameters (2 + 2 layers, width 96, one token per character), which restores the
  vowels of phrases of one to three words: `n th bgnnng` -> `in the beginning`.

The text is in the public domain. On Debian 13::

    apt-get install bible-kjv
    bible -f Gen1:1-Rev22:21 > kjv.txt
    python benchmarks/train_embedded.py --text kjv.txt

writes both Hugging Face folders, parts of the text and phrase pairs to `plugins/hf/tensornet_hf/data`. A
`training.json` in each folder records how the model was made. This takes 20 to 30 minutes on one core. The
text file has one verse per line, `Ge1:1 In the beginning ...`. `--toy` makes a few steps with tiny batches,
to test the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

DATA = Path(__file__).resolve().parents[1] / "plugins" / "hf" / "tensornet_hf" / "data"
CONTEXT = 128
END = "<|endoftext|>"
VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.+)$")
WORD = re.compile(r"[a-z']*[a-z]")
ALPHABET = "abcdefghijklmnopqrstuvwxyz '"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Options of training; `batch` is a number of sequences, `warmup` a fraction of `steps`."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.1
    warmup: float = 0.04
    seed: int = 0


GPT2_RECIPE = Recipe(steps=3500, batch=16, learning_rate=5e-3)
# With many small batches the model learns more phrases than with few large batches of the same text.
T5_RECIPE = Recipe(steps=7000, batch=32, learning_rate=2e-3, weight_decay=0.01)
PAIRS = 400
WINDOWS = f"non-overlapping, {CONTEXT} tokens, each predicts its last {CONTEXT - 1}, the tail is dropped"


@dataclasses.dataclass(frozen=True)
class Split:
    """Parts of the text, as lists of chapters with one verse per line; `train` contains `calibration`."""

    train: list[str]
    calibration: list[str]
    heldout: list[str]


def read_chapters(path: Path) -> list[str]:
    """Read the chapters of a text file in order; the file has one verse per line.

    Raises:
        ValueError: a line is not `<book><chapter>:<verse> <text>`.
    """
    chapters: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = VERSE.match(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: expected one verse such as 'Ge1:1 In the beginning', "
                f"got {line[:60]!r}; make the file as described in the docstring of train_embedded.py"
            )
        book, chapter, _, text = match.groups()
        chapters.setdefault((book, chapter), []).append(text.strip())
    return ["\n".join(verses) for verses in chapters.values()]


def split_chapters(chapters: Sequence[str]) -> Split:
    """Split chapters: of every 40, one is held out, and two of the others are for calibration."""
    train = [c for i, c in enumerate(chapters) if i % 40 != 7]
    return Split(
        train=train,
        calibration=[c for i, c in enumerate(chapters) if i % 20 == 3],
        heldout=[c for i, c in enumerate(chapters) if i % 40 == 7],
    )


def join_chapters(chapters: Sequence[str]) -> str:
    """Join chapters into one text, with a blank line after each chapter, as in the training of GPT-2."""
    return "".join(f"{chapter}\n\n" for chapter in chapters)


def strip_vowels(phrase: str) -> str:
    """Remove a, e, i, o, u from every word; words of vowels only (`i`, `a`) are not changed."""
    return " ".join(re.sub("[aeiou]", "", word) or word for word in phrase.split(" "))


def verse_words(chapters: Sequence[str]) -> list[list[str]]:
    """Return the words of every verse of at least three words, in lower case, without punctuation."""
    verses = (WORD.findall(verse.lower()) for chapter in chapters for verse in chapter.split("\n"))
    return [verse for verse in verses if len(verse) >= 3]


def sample_phrases(verses: Sequence[Sequence[str]], count: int, rng: random.Random) -> list[str]:
    """Draw `count` phrases, each of one to three neighbouring words of a verse."""
    # Verses are drawn in proportion to their length, so that all words are about equally likely.
    picked = rng.choices(verses, weights=[len(verse) for verse in verses], k=count)
    phrases = []
    for verse in picked:
        length = rng.randint(1, 3)
        start = rng.randint(0, len(verse) - length)
        phrases.append(" ".join(verse[start : start + length]))
    return phrases


def distinct_pairs(chapters: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Return up to `count` distinct pairs `(phrase without vowels, phrase)` for evaluation or calibration."""
    phrases = dict.fromkeys(sample_phrases(verse_words(chapters), 4 * count, random.Random(seed)))
    return [(strip_vowels(phrase), phrase) for phrase in list(phrases)[:count]]


def train_bpe(chapters: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer as for GPT-2; it can encode any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(chapters, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, and special tokens as in T5: pad 0, eos 1, unk 2."""
    names = ["<pad>", "</s>", "<unk>", *ALPHABET]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def fit(model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]], recipe: Recipe) -> list[float]:
    """Train a model (AdamW, linear warm-up, cosine decay).

    Returns:
        Mean losses over successive twentieths of the steps.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, round(recipe.warmup * recipe.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, recipe.steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    every = max(1, recipe.steps // 20)
    losses: list[float] = []
    curve: list[float] = []
    model.train()
    for step in range(1, recipe.steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % every == 0:
            curve.append(round(sum(losses[-every:]) / every, 4))
            print(f"{model.config.model_type} step {step}/{recipe.steps} loss {curve[-1]:.4f}", flush=True)
    model.eval()
    return curve


def window_batches(stream: torch.Tensor, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield shuffled windows of `stream: (tokens,)` endlessly, cut at a random offset in each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        count = (len(stream) - offset) // CONTEXT
        windows = stream[offset : offset + count * CONTEXT].view(count, CONTEXT)
        for rows in torch.randperm(count, generator=generator).split(batch):
            ids = windows[rows]  # shape: (batch, CONTEXT)
            yield {"input_ids": ids, "labels": ids}


def phrase_batches(
    chapters: Sequence[str], tokenizer: PreTrainedTokenizerFast, batch: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of randomly drawn phrases endlessly; the phrases in a batch have similar lengths."""
    rng = random.Random(seed)
    verses = verse_words(chapters)
    while True:
        # Phrases for several batches are sorted by length, which saves most of the padding.
        phrases = sorted(sample_phrases(verses, 16 * batch, rng), key=len)
        cuts = list(range(0, len(phrases), batch))
        rng.shuffle(cuts)
        for cut in cuts:
            targets = phrases[cut : cut + batch]
            inputs = tokenizer([strip_vowels(t) for t in targets], padding=True, return_tensors="pt")
            labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids
            yield {
                "input_ids": inputs.input_ids,
                "attention_mask": inputs.attention_mask,
                "labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100),
            }


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: torch.Tensor) -> float:
    """Compute the perplexity per token of `stream: (tokens,)`, over windows as described by `WINDOWS`."""
    count = len(stream) // CONTEXT
    batches = stream[: count * CONTEXT].view(count, CONTEXT).split(32)
    total = sum(float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in batches)
    return math.exp(total / count)


def character_accuracy(guess: str, target: str) -> float:
    """Count the positions at which two texts agree, as a fraction of the longer text's length."""
    return sum(a == b for a, b in zip(guess, target, strict=False)) / max(len(guess), len(target))


@torch.no_grad()
def restoration(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Measure exact match and character accuracy of greedy generation on pairs of phrases."""
    sources, targets = zip(*pairs, strict=True)
    inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
    tokens = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    guesses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    exact = [guess == target for guess, target in zip(guesses, targets, strict=True)]
    characters = [character_accuracy(g, t) for g, t in zip(guesses, targets, strict=True)]
    return {
        "exact_match": round(sum(exact) / len(pairs), 4),
        "character_accuracy": round(sum(characters) / len(pairs), 4),
        "pairs": len(pairs),
    }


def train_gpt2(split: Split, recipe: Recipe, folder: Path, provenance: dict[str, Any]) -> None:
    tokenizer = train_bpe(split.train)
    end = tokenizer.eos_token_id
    torch.manual_seed(recipe.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_inner=512,
            # The default of 0.02 is for width 768; narrow models learn faster with larger weights.
            initializer_range=0.06,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    core = tokenizer.backend_tokenizer
    stream = torch.tensor([i for c in split.train for i in [end, *core.encode(f"{c}\n\n").ids]])
    started = time.perf_counter()
    curve = fit(model, window_batches(stream, recipe.batch, recipe.seed), recipe)
    seconds = time.perf_counter() - started
    heldout = torch.tensor(core.encode(join_chapters(split.heldout)).ids)
    result = {
        "train_tokens": len(stream),
        "heldout_tokens": len(heldout),
        "heldout_perplexity": round(perplexity(model, heldout), 4),
        "heldout_windows": WINDOWS,
    }
    save(model, tokenizer, folder, recipe, curve, seconds, provenance | result)


def train_t5(split: Split, recipe: Recipe, folder: Path, provenance: dict[str, Any]) -> None:
    tokenizer = character_tokenizer()
    torch.manual_seed(recipe.seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.max_new_tokens = 64
    started = time.perf_counter()
    curve = fit(model, phrase_batches(split.train, tokenizer, recipe.batch, recipe.seed), recipe)
    seconds = time.perf_counter() - started
    pairs = distinct_pairs(split.heldout, PAIRS, seed=1)
    result = {"heldout": restoration(model, tokenizer, pairs)}
    save(model, tokenizer, folder, recipe, curve, seconds, provenance | result)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    recipe: Recipe,
    curve: list[float],
    seconds: float,
    facts: dict[str, Any],
) -> None:
    """Write model and tokenizer to a Hugging Face folder, with a `training.json`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "recipe": dataclasses.asdict(recipe) | {"optimizer": "AdamW", "schedule": "linear warm-up, cosine"},
        "seconds": round(seconds, 1),
        "final_loss": curve[-1],
        "loss_curve": curve,
        **facts,
    }
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors sets 0600, which the wheel would keep
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(folder.name, {k: v for k, v in record.items() if k.startswith("heldout")})


def write_slices(split: Split, out: Path) -> None:
    """Write the texts and the phrase pairs that the package contains in addition to the models."""
    (out / "calibration.txt").write_text(join_chapters(split.calibration), encoding="utf-8")
    (out / "heldout.txt").write_text(join_chapters(split.heldout), encoding="utf-8")
    for name, chapters in (("calibration", split.calibration), ("heldout", split.heldout)):
        pairs = distinct_pairs(chapters, PAIRS, seed=1)
        lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
        (out / f"t5_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the Bible, one verse per line")
    parser.add_argument(
        "--out", type=Path, default=DATA, help="folder to write to (default: data of the package)"
    )
    parser.add_argument("--toy", action="store_true", help="a few steps of tiny batches, to test the script")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # sums then always have the same order, so results are reproducible
    split = split_chapters(read_chapters(options.text))
    provenance = {
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "train_chapters": len(split.train),
        "heldout_chapters": len(split.heldout),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_slices(split, options.out)
    for name, run, recipe in (("gpt2", train_gpt2, GPT2_RECIPE), ("t5", train_t5, T5_RECIPE)):
        chosen = dataclasses.replace(recipe, steps=3, batch=2) if options.toy else recipe
        run(split, chosen, options.out / name, provenance)


if __name__ == "__main__":
    main()

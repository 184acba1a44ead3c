"""Comparison of a compressed model with plain methods at the same bytes, for the report and the demo."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from tensornet._util import progress_bar
from tensornet.calibration import CalibrationStats
from tensornet.compression import CompressionPlan, CompressionReport
from tensornet.compression.baselines import (
    BaselineLosses,
    BaselineResult,
    apply_baseline,
    baseline_configs,
    baseline_losses,
    predict_baseline,
)
from tensornet.compression.report import model_size
from tensornet_hf.report import BondSpectrum, ModelFacts, Page, versions
from tensornet_hf.streaming import peak_memory
from tensornet_hf.text.quality import Judge, Quality, judge_of
from tensornet_hf.text.tokens import continue_text, load_tokenizer

#: Words of the held-out text that samples go on from, and the tokens they write.
PROMPT_WORDS, SAMPLE_TOKENS = 12, 60


@dataclass(frozen=True)
class Comparison:
    """The dense model and the plain methods, measured before anything is compressed.

    Args:
        dense: quality of the dense model, None without a held-out text.
        baselines: plain methods at the bytes of the plan.
        losses: their predicted losses by layer, and over sizes.
        judge: measures the compressed model on the same tokens.
        sampler: writes samples, None for models that write nothing.
        sample: of the dense model.
    """

    dense: Quality | None
    baselines: tuple[ModelFacts, ...]
    losses: BaselineLosses
    judge: Judge | None
    sampler: "Sampler | None"
    sample: str | None

    def of(self, model: PreTrainedModel) -> tuple[Quality | None, str | None]:
        """Measure the quality of the compressed model, and write its sample."""
        quality = None if self.judge is None else self.judge(model)
        return quality, None if self.sampler is None else self.sampler(model)

    def rows(
        self,
        report: CompressionReport,
        sizes: tuple[int, int],
        found: tuple[Quality | None, str | None],
        *,
        predicted: bool = True,
    ) -> tuple[ModelFacts, ...]:
        """Return the rows of the report: original, compressed, plain methods.

        Args:
            report: of the compression.
            sizes: of the weight files, before and after.
            found: quality and sample of the compressed model, see `of`.
            predicted: whether the prediction holds: not after refitting or healing.
        """
        plan, (quality, sample) = report.plan, found
        original = ModelFacts(
            "original",
            report.model_params_before,
            sizes[0],
            8 * plan.bytes_before / plan.params_before,
            quality=self.dense,
            sample=self.sample,
        )
        rise = plan.predicted_loss_increase if predicted else None
        compressed = ModelFacts(
            "compressed",
            report.model_params_before - plan.params_before + plan.params_after,
            sizes[1],
            plan.bits_per_weight,
            "as planned" if predicted else "planned, then trained",
            quality,
            rise,
            sample,
        )
        return original, compressed, *self.baselines


@dataclass(frozen=True)
class Sampler:
    """Continues one prompt greedily.

    Args:
        folder: holds the tokenizer.
        prompt: to go on from.
        tokens: to write.
        temperature: 0 takes the likeliest token each time.
        seed: of the drawing.
    """

    folder: Path
    prompt: str
    tokens: int = SAMPLE_TOKENS
    temperature: float = 0.0
    seed: int = 0

    def __call__(self, model: PreTrainedModel) -> str:
        """Return the text that a model writes."""
        return continue_text(
            model,
            load_tokenizer(self.folder),
            self.prompt,
            max_new_tokens=self.tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    @property
    def how(self) -> str:
        """Description of how tokens are chosen, in a few words."""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, seed {self.seed}"


def compare_baselines(
    model: PreTrainedModel,
    folder: Path,
    plan: CompressionPlan,
    stats: CalibrationStats | None,
    *,
    text: str | None = None,
    name: str = "held-out text",
    sampler: Sampler | None = None,
    progress: bool = False,
) -> Comparison:
    """Predict, and measure on a held-out text, the plain methods at the bytes of a plan.

    Args:
        model: dense, and left as it is.
        folder: holds its tokenizer.
        plan: gives the layers and their bytes.
        stats: the plan was made with them.
        text: held out; without one losses are predicted only.
        name: of the text.
        sampler: writes samples; if absent, the beginning of the text is continued greedily.
        progress: show progress bars.

    Raises:
        TargetError: a text has no labels for a model of this kind.
        ValueError: the text is too short.
    """
    judge = None if text is None else judge_of(model, folder, text, name=name)
    if sampler is None and text is not None:
        sampler = _sampler(model, folder, text)
    losses = baseline_losses(model, plan, stats, progress=progress)
    dense = None if judge is None else judge(model)
    found = []
    methods = list(baseline_configs(plan, stats))
    for method in progress_bar(methods, desc="plain methods", unit="method", disable=not progress):
        if judge is None:
            made, quality = predict_baseline(model, plan, method, stats), None
        else:
            copied = copy.deepcopy(model)
            made = apply_baseline(copied, plan, method, stats)
            quality = judge(copied)
            del copied
        found.append(baseline_facts(model, plan, made, quality))
    sample = None if sampler is None else sampler(model)
    return Comparison(dense, tuple(found), losses, judge, sampler, sample)


def baseline_facts(
    model: PreTrainedModel, plan: CompressionPlan, made: BaselineResult, quality: Quality | None
) -> ModelFacts:
    """Describe a plain method as a row of the report; its bytes are counted, since nothing is saved."""
    params, size = model_size(model)
    return ModelFacts(
        name=made.method,
        form=made.scheme,
        params=params - plan.params_before + made.num_params,
        bytes=size - plan.bytes_before + made.num_bytes,
        bits=8 * made.num_bytes / plan.params_before,
        quality=quality,
        predicted_rise=made.predicted_loss_increase,
    )


def folder_page(
    name: str,
    comparison: Comparison,
    rows: Sequence[ModelFacts],
    report: CompressionReport,
    *,
    spectra: Mapping[str, Sequence[BondSpectrum]],
    command: str,
    notes: Sequence[str] = (),
) -> Page:
    """Collect the contents of the HTML page about one compression.

    Args:
        name: of the model, a folder or a hub id.
        comparison: with the plain methods.
        rows: original, compressed, plain methods.
        report: of the compression.
        spectra: see `tensornet_hf.pipeline.plan_spectra`.
        command: that made it.
        notes: remarks.
    """
    sampler = comparison.sampler
    return Page(
        f"{name}, compressed",
        rows,
        report,
        spectra,
        comparison.losses,
        prompt=None if sampler is None else sampler.prompt,
        sampled="" if sampler is None else sampler.how,
        made=(("Command", command), ("Versions", versions())),
        notes=notes,
        peak_memory=peak_memory() or None,
    )


def _sampler(model: PreTrainedModel, folder: Path, text: str) -> Sampler | None:
    """Build a sampler that continues the first words of a text; None for models that generate no text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        return None
    prompt = " ".join(text.split()[:PROMPT_WORDS])
    sampler = Sampler(folder, prompt)
    positions = getattr(model.config, "max_position_embeddings", None)
    length = len(load_tokenizer(folder)(prompt).input_ids)
    if positions is not None and length + SAMPLE_TOKENS > positions:
        return None if length + 1 > positions else Sampler(folder, prompt, positions - length)
    return sampler

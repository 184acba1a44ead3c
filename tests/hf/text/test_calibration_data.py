"""What a text is for each kind of model: windows, pairs, passages; and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import copy_with_bos
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import tensornet as tn
from tensornet.calibration import cosine_losses, label_losses, sampled_losses
from tensornet.calibration.losses import IGNORED
from tensornet.errors import FormatError, TargetError
from tensornet_hf.checkpoint import load
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import gpt2_path, heldout_text, t5_pairs, t5_path
from tensornet_hf.evaluate import perplexity, record_held_out
from tensornet_hf.lazy_model import open_model
from tensornet_hf.text import (
    bos_token,
    calibration_data,
    load_tokenizer,
    random_windows,
    token_ids,
    usual_context,
)

WORDS = ["the", "river", "runs", "past", "a", "mill", "and", "two", "old", "trees", "to", "sea"]
TEXT = "\n\n".join(" ".join(WORDS[k % 12 :] + WORDS[: k % 5]) for k in range(40))
SMALL = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 32,
}


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A folder with a word-by-word tokenizer."""
    folder = tmp_path / "bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def bert(kind: type[PreTrainedModel], folder: Path, **more: object) -> PreTrainedModel:
    model = kind(BertConfig(**SMALL, **more)).eval()
    model.save_pretrained(folder)
    return model


def test_causal_models_read_windows() -> None:
    data = calibration_data(load(gpt2_path()), gpt2_path(), "And he said unto them. " * 200, tokens=600)
    assert data.loss_fn is label_losses
    assert [tuple(batch.shape) for batch in data.batches] == [(4, 128)]
    assert data.tokens == 512


def test_windows_begin_as_texts_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some tokenizers put a token before every text, as those of Llama and Gemma do."""
    model, text, folder = load(gpt2_path()), heldout_text()[:9_000], tmp_path / "model"
    bos = copy_with_bos(gpt2_path(), folder)
    assert bos_token(load_tokenizer(folder)) == bos
    assert bos_token(load_tokenizer(gpt2_path())) is None

    ours, others = (calibration_data(model, x, text, tokens=1024).batches for x in (folder, gpt2_path()))
    for batch, other in zip(ours, others, strict=True):
        assert isinstance(batch, Tensor)
        assert isinstance(other, Tensor)
        assert (batch[:, 0] == bos).all()
        assert not (other[:, 0] == bos).any()
        assert torch.equal(batch[:, 1:], other[:, 1:])
    ids = token_ids(load_tokenizer(folder), text)
    assert bos not in ids.tolist()
    expected = perplexity(model, ids, context=128, bos=bos)
    assert expected.loss != pytest.approx(perplexity(model, ids, context=128).loss, rel=1e-5)
    recorded = record_held_out(model, folder, text, tokens=None)
    assert float(recorded.losses.double().mean()) == pytest.approx(expected.loss, rel=1e-5)
    (tmp_path / "text.txt").write_text(text)
    for more in ((), ("--reference", str(folder))):
        assert not run(["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--json", *more])
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected.loss, rel=1e-5)


def test_windows_are_a_repeatable_sample_of_the_whole_text() -> None:
    ids = torch.arange(1000)
    windows = random_windows(ids, 8, 400)
    assert windows.shape == (50, 8)
    torch.testing.assert_close(windows, random_windows(ids, 8, 400))
    torch.testing.assert_close(random_windows(ids, 8).sort(0).values.reshape(-1), ids)
    assert (windows[:, 0] % 8 == 0).all()
    assert 300 < windows.float().mean() < 700


def test_encoder_decoders_answer_the_lines_themselves() -> None:
    model = load(t5_path()).eval()
    sources, answers = zip(*t5_pairs("calibration")[:20], strict=True)
    data = calibration_data(model, t5_path(), "\n".join(sources))
    assert data.loss_fn is sampled_losses
    assert [len(batch["input_ids"]) for batch in data.batches] == [16, 4]
    tokenizer = AutoTokenizer.from_pretrained(t5_path())
    said = []
    for batch in data.batches:
        labels = batch["labels"]
        ended = labels == model.generation_config.eos_token_id
        assert bool((ended.sum(1) <= 1).all())  # nothing is asked behind the end
        assert bool((labels[ended.cumsum(1) - ended.long() > 0] == IGNORED).all())
        said += tokenizer.batch_decode(labels.masked_fill(labels == IGNORED, 0), skip_special_tokens=True)
    with torch.no_grad():
        first = tokenizer(sources[0], return_tensors="pt")
        alone = tokenizer.decode(model.generate(**first, max_new_tokens=64)[0], skip_special_tokens=True)
    assert said[0] == alone
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= 3  # it is a model that can answer


def test_answers_may_be_given() -> None:
    pairs = t5_pairs("calibration")[:20]
    model = load(t5_path()).eval()
    data = calibration_data(model, t5_path(), "\n".join("\t".join(pair) for pair in pairs))
    tokenizer = AutoTokenizer.from_pretrained(t5_path())
    expected = tokenizer(pairs[3][1]).input_ids
    found = data.batches[0]["labels"][3]  # type: ignore[index]
    assert found[found != IGNORED].tolist() == expected


def test_masked_models_are_scored_on_hidden_tokens(bert_folder: Path) -> None:
    model = bert(BertForMaskedLM, bert_folder)
    data = calibration_data(model, bert_folder, TEXT)
    assert data.loss_fn is sampled_losses
    shares = []
    for batch in data.batches:
        hidden = batch["input_ids"] == 4  # type: ignore[index]
        assert bool((hidden == (batch["labels"] != IGNORED)).all())  # type: ignore[index]
        assert int(batch["labels"].max()) > 4  # type: ignore[index]
        shares.append(float(hidden.sum() / batch["attention_mask"].sum()))  # type: ignore[index]
    assert 0.05 < sum(shares) / len(shares) < 0.2
    again = calibration_data(model, bert_folder, TEXT)
    assert torch.equal(data.batches[0]["input_ids"], again.batches[0]["input_ids"])  # type: ignore[index]
    stats = tn.calibrate(model, data.batches, loss_fn=data.loss_fn)
    assert "bert.encoder.layer.0.output.dense" in stats.rows


def test_classifiers_are_scored_on_their_own_predictions(bert_folder: Path) -> None:
    model = bert(BertForSequenceClassification, bert_folder, num_labels=3)
    data = calibration_data(model, bert_folder, TEXT)
    assert data.loss_fn is sampled_losses
    assert sampled_losses(model, data.batches[0]).shape == (16,)  # type: ignore[arg-type]
    assert tn.calibrate(model, data.batches, loss_fn=data.loss_fn).has_gradients


def test_encoders_are_judged_by_the_cosine(bert_folder: Path) -> None:
    model = bert(BertModel, bert_folder)
    data = calibration_data(model, bert_folder, TEXT, tokens=100)
    assert data.loss_fn is cosine_losses
    assert len(data.batches) == 1  # the first holds enough
    assert data.tokens == int(data.batches[0]["attention_mask"].sum())  # type: ignore[index]


def test_what_a_text_cannot_calibrate(bert_folder: Path) -> None:
    model = bert(BertForQuestionAnswering, bert_folder)
    with pytest.raises(TargetError, match="neither classes"):
        calibration_data(model, bert_folder, TEXT)
    small = {k: v for k, v in SMALL.items() if "vocab" not in k and "position" not in k}
    with pytest.raises(TargetError, match="pixel_values"):
        calibration_data(ViTModel(ViTConfig(**small)), bert_folder, TEXT)


def test_a_text_without_lines() -> None:
    with pytest.raises(ValueError, match="no line"):
        calibration_data(load(t5_path()), t5_path(), "\n \n")


@pytest.mark.slow
def test_command_line_calibrates_and_heals_an_encoder_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "pairs.txt"
    text.write_text("\n".join("\t".join(pair) for pair in t5_pairs("calibration")[:100]))
    out = tmp_path / "out"
    command = ["compress", str(t5_path()), str(out), "--param-ratio", "0.6", "--calibration", str(text)]
    assert run([*command, "--heal", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["param_ratio"] <= 0.6
    assert report["measured"]["tokens"] > 0  # of compression alone, before healing
    assert load(out).config.is_encoder_decoder


def test_command_line_calibrates_an_encoder(
    bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert(BertModel, bert_folder)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["plan", str(bert_folder), "--json", "--param-ratio", "0.7"]
    assert run([*command, "--calibration", str(text)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["objective"] == "curvature"
    assert plan["calibration"].endswith("tokens of text.txt")
    assert plan["predicted_loss_increase"] > 0
    assert plan["dense_loss"] is plan["predicted_perplexity"] is None  # a cosine distance has no perplexity


def test_passages_have_no_more_tokens_than_model_and_tokenizer_allow(bert_folder: Path) -> None:
    xlnet = XLNetConfig(d_model=8, n_head=2, n_layer=1, d_inner=8)
    with torch.device("meta"):
        assert usual_context(XLNetLMHeadModel(xlnet)) == 1024  # the configuration says -1: any number
    file = bert_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 5}))
    data = calibration_data(bert(BertModel, bert_folder), bert_folder, TEXT, tokens=100)
    assert max(x["input_ids"].shape[1] for x in data.batches) == 5


def test_weights_that_are_not_stored_are_computed(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "vocab_size": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    tokens = {"pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    MarianMTModel(MarianConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path)
    name = "model.encoder.embed_positions.weight"
    loaded, lazy = MarianMTModel.from_pretrained(tmp_path), open_model(tmp_path)
    assert name not in lazy.origins
    assert torch.equal(lazy.model.get_parameter(name), loaded.get_parameter(name))


def test_a_missing_weight_is_not_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class may list a weight as not stored that only some of its models compute or tie."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_save", ["lm_head.weight"])
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"lm_head\.weight.*does not store it"):
        open_model(tmp_path)

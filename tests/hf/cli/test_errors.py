"""The program fails in one line on stderr, with a status; nothing is printed, changed or half written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from sharded_folders import contents

from tensornet.errors import FormatError
from tensornet.gone import GONE
from tensornet_hf.cli.main import as_options, options_of
from tensornet_hf.embedded import gpt2_path, t5_path

Run = Callable[..., tuple[int, str, str]]


def nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def scribbled(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 30)


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def bare(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def magic(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    entry = '{"quantization_config": {"quant_method": "magic"}, '
    (folder / "config.json").write_text(entry + text.strip()[1:])


#: Copies of the embedded GPT-2, each with what is wrong in it.
SPOILED = (nan, scribbled, cut, bare, magic)
TEXTS = {"text": "In the beginning God created the heaven and the earth. " * 30, "short": "In", "empty": "\n"}
TEXTS["other"] = TEXTS["text"]
#: Command lines that fail (GPT2 and T5 are the embedded models), and the decisive words.
FAILED = [
    ("compress GPT2 taken HALF", "taken exists already"),
    ("compress taken out HALF", r"has no config\.json"),
    ("compress GPT2 out HALF --rotate", "GPT2LMHeadModel cannot be rotated"),
    ("compress nan out HALF", r"'transformer\.h\.1\.mlp\.c_fc' contains 1 NaN"),
    ("compress cut out HALF", r"model\.safetensors is truncated or damaged"),
    ("compress scribbled out HALF", r"model\.safetensors is truncated or damaged"),
    ("compress GPT2 out --topology-option rel_error=0.5 --target nosuch", "'nosuch' matches no layer"),
    ("compress GPT2 out --topology-option rel_error=0.5 --target re:(", "not a regular expression"),
    ("compress GPT2 out --bits 4.25", "with --calibration FILE.*--calibration default"),
    ("compress GPT2 out", "says how far"),
    ("compress GPT2 out --bits 4 --method nearest", "--formats int4"),
    ("compress GPT2 out --bits 4 --calibration text.txt --survey taken", "taken"),
    (
        "compress GPT2 out --bits 8.5 --method nearest --to compressed-tensors",
        "'compressed-tensors' can pack none",
    ),
    ("upcycle GPT2 out --experts 4 --option noise=-1", "noise must"),
    ("compress GPT2 out --topology-option rel_error=0.5 --workers 0", "workers.* must be at least 1"),
    (
        "compress GPT2 out --param-ratio 0.0001 --method svd",
        r"'transformer\.h\.0\.attn\.c_attn'.*budget",
    ),
    ("compress GPT2 out --topology-option rel_error=0.5 --dtype int3", "Unknown dtype 'int3'"),
    ("compress GPT2 out --topology-option rel_error=0.5 --topology x", "x.*low_rank.*mpo"),
    ("compress GPT2 out CHAIN --topology-option sites=30 --calibration text.txt", "at most 25 legs"),
    ("compress GPT2 out CHAIN --topology-option colour=red", "does not know the options colour.*in_dims"),
    ("compress GPT2 out --bits 4 --formats int9", "Unknown number format 'int9'"),
    ("compress GPT2 out --tokens-per-second 9", "needs speeds: a JSON file"),
    ("compress GPT2 out --tokens-per-second 9 --speeds no.json", "--speeds no.json cannot be read"),
    ("compress GPT2 out --bits 4 --formats gguf-slow", "Menus are gguf, gguf-fast"),
    ("compress GPT2 out --topology-option rel_error=0.5 --report no/r.html", "report cannot be written"),
    ("compress GPT2 out --plan empty.txt", "Cannot read a compression plan"),
    ("compress GPT2 out --topology-option max_bond=4 --calibration short.txt", "fewer than a window"),
    ("compress bare out --topology-option max_bond=4 --calibration text.txt", "has no tokenizer"),
    ("compress GPT2 hf://a/b/c --topology-option rel_error=0.5", "not an address on the hub"),
    ("decompress GPT2 out", "nothing to decompress"),
    ("upcycle GPT2 out --experts 2 --top-k 3 --router topk", "--top-k 3 with --experts 2"),
    (
        "upcycle GPT2 --experts 2 --router expert_choice",
        "--router expert_choice looks.*Use --router switch or",
    ),
    ("upcycle T5 --experts 2 --router expert_choice", "select them with --target"),
    ("upcycle GPT2 taken", "taken exists already"),
    ("upcycle GPT2 out --pool all --experts 2", "so at least 8 are needed"),
    ("upcycle GPT2 out --share centre", "--share centre; choose one of none, center, base"),
    ("upcycle GPT2 out --share center --option rank=3", "the deltas of --share base"),
    ("eval T5 --text text.txt", "not a causal language model"),
    ("eval GPT2 --text text.txt --context 500", "more than the 128 positions"),
    ("eval GPT2 --text absent.txt", r"There is no file absent\.txt"),
    ("eval GPT2 --text empty.txt", r"empty\.txt contains no text"),
    ("eval GPT2 --text latin.txt", r"latin\.txt is not UTF-8 text"),
    ("generate GPT2 ''", "prompt is empty"),
    ("generate GPT2 a --max-new-tokens 0", "--max-new-tokens must be at least 1"),
    ("generate GPT2 a --max-new-tokens 500", "has 128 positions"),
    ("generate GPT2 a --chat", "no chat template, which --chat needs"),
    ("eval magic --text text.txt", "quantized by 'magic'"),
]
#: Command lines that ask for what does not go together.
WRONG = [
    ("frobnicate", "frobnicate"),
    ("compress", "source"),
    ("inspect x --what", "--what"),
    ("compress x --max-bytes y", "--max-bytes"),
    ("compress GPT2 --topology-option rel_error=0.5", "destination"),
    ("compress GPT2 out --int8", "No such option"),
    ("compress GPT2 out --formatt int8", "--formats"),
    ("compress GPT2 out --bits 4 --method nearest --survey p", "--survey.*--calibration"),
    ("compress GPT2 out HALF --calibration-tokens 100", "add --calibration"),
    (
        "eval GPT2 --text text.txt --limit 3 --task-path .",
        "--tasks NAMES, or leave out --task-path and --limit",
    ),
    ("eval GPT2 --tasks x --context 9", "--text FILE, or leave out --context"),
    ("compress GPT2 out --plan p.json --topology mpo --target c_fc", "leave out --target and --topology"),
    ("plan GPT2 --bits 4.25 --held-out text.txt", "No such option"),
    ("recipe GPT2 r.txt --bits 5", "give a text, --calibration, or an importance matrix, --imatrix"),
    ("recipe GPT2 r.txt --calibration text.txt", "one budget: --max-bytes .* or --bits"),
    ("recipe GPT2 r.txt --bits 5 --imatrix i --survey s", "add --calibration, or leave out --survey"),
    ("recipe GPT2 r.txt --bits 5 --rotate", "No such option"),
    (
        "compress GPT2 out --bits 4 --calibration text.txt --held-out text.txt",
        "--held-out is the file of --cal",
    ),
    ("compress GPT2 out HALF --damping 0.2", "damping is gone"),
    ("compress GPT2 out HALF --sites 3", "topology_options|--topology-option sites=4"),
    ("compress GPT2 out HALF --heal 3", "--heal trains on the calibration text; add --calibration"),
    ("compress GPT2 out HALF --refine", "--refine refits layers on the calibration text; add --calibration"),
    ("compress x y --param-ratio 50", "if it is a percentage, write 0.5 for 50 %"),
    ("upcycle x y --pool some", "'all' or a number of neighbouring layers, such as 2; got 'some'"),
    ("compress x y --max-bytes 60XB", "'60XB' is not a size"),
    ("compress GPT2 out CHAIN --topology-option sites", "takes KEY=VALUE, such as sites=3; got 'sites'"),
    ("compress GPT2 out CHAIN --topology-option a=2 --topology-option a=3", "sets a twice"),
    ("eval GPT2", "Say what to measure: --text FILE"),
    ("eval GPT2 --text x --task-path .", "leave out --task-path"),
    *(
        (f"{command} --device nothing", "nothing is not available on this machine")
        for command in ("compress x y", "upcycle x y", "decompress x y", "eval x", "generate x", "demo")
    ),
]


@pytest.mark.parametrize(
    ("line", "message", "wanted"), [*((*x, 1) for x in FAILED), *((*x, 2) for x in WRONG)], ids=str
)
def test_one_line_a_status_and_nothing_else(
    line: str, message: str, wanted: int, tensornet: Run, tmp_path: Path
) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    for spoil in SPOILED:
        if spoil.__name__ in line.split():
            spoil(shutil.copytree(gpt2_path(), tmp_path / spoil.__name__))
    before = contents(tmp_path)
    chain = "--param-ratio 0.5 --topology mpo --target h.0.mlp.c_fc"
    given = line.replace("HALF", "--param-ratio 0.5 --method svd").replace("CHAIN", chain)
    paths = {"GPT2": gpt2_path(), "T5": t5_path()}
    status, out, err = tensornet(*(paths.get(word, word) for word in shlex.split(given)))
    assert (status, out) == (wanted, "")
    (said,) = err.splitlines()
    assert said.startswith("tensornet: ")
    assert re.search(message, said)
    assert contents(tmp_path) == before  # no hidden partial folder either


@pytest.mark.parametrize("name", sorted(name for name in GONE if name.islower()))
def test_gone_options_are_explained(name: str, tensornet: Run) -> None:
    option = f"--{name.replace('_', '-')}"
    status, _, err = tensornet("compress", gpt2_path(), "out", option, 1)
    assert status == 2
    assert option in err
    assert "is gone" in err


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("loss_increase must be above 0", "--loss-increase must be above 0"),
        ("the damping of max_bytes", "the damping of --max-bytes"),
        ("give formats=('int4',) or param_ratio=0.5.", "give --formats int4 or --param-ratio 0.5."),
        ("exclude_modules=['*.read', 'head'].", "--exclude '*.read' --exclude head."),
        ("calibration=batches, or calibration='default'", "--calibration FILE, or --calibration default"),
        ("bits_per_weight= and max_bytes=", "--bits and --max-bytes"),
        ("topology_options={'sites': 4, 'a': [2]}", "--topology-option sites=4 --topology-option a=[2]"),
        ("force=True, resume=False", "--force, --no-resume"),
        ("'rel_error' in /tmp/max_bond/x has formats", "'rel_error' in /tmp/max_bond/x has formats"),
    ],
)
def test_messages_name_options(text: str, translated: str) -> None:
    assert as_options(text, options_of("compress")) == translated


def test_negated_options_say_what_is_left_out(tensornet: Run) -> None:
    shown = " ".join(re.sub(r"[│\s]+", " ", tensornet("compress", "--help")[1]).split())
    assert "--no-resume Do not continue" in shown
    assert "Do not whether" not in shown


def test_debug_lets_the_error_through(tensornet: Run) -> None:
    with pytest.raises(FormatError, match=r"no config\.json"):
        tensornet("inspect", "--debug", ".")


def test_ctrl_c_is_one_line(tensornet: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Interrupted in the middle of its work, with and without something to keep."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    plain = ("compress", gpt2_path(), "out", "--topology-option", "rel_error=0.5")
    monkeypatch.setattr("tensornet_hf.compress.open_lazily", stop)
    assert tensornet(*plain) == (130, "", "tensornet: interrupted; nothing was written.\n")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tensornet.compression.road.compress_alone", stop)
    status, _, err = tensornet(*plain)
    assert status == 130
    assert re.search(r"finished parts are kept in .*\.out\.partial; run the same command again", err)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


# As the console script does, in a process that cannot reach a network.
PROGRAM = """
import logging, socket, sys
for name in ("torchao", "torch.utils._pytree"):  # it logs which kernels do not load here
    logging.getLogger(name).disabled = True
def offline(*args): raise RuntimeError("the program must not reach for the network")
socket.socket.connect = offline
{before}
from tensornet._entry import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "before", "message"),
    [
        (
            str(gpt2_path()),
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))",
            "tensornet: Writing .*out failed: .*Free some space",
        ),
        ("nobody/nothing", "", "tensornet: nobody/nothing is not a local folder"),
    ],
    ids=["full disk", "hub id"],
)
def test_in_a_process_of_its_own(source: str, before: str, message: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["compress", source, "out", "--param-ratio", "0.5", "--method", "svd"]
    command = [sys.executable, "-c", PROGRAM.format(before=before), *command]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert re.match(message, line)
    assert {x.name for x in tmp_path.iterdir()} <= {".out.partial"}  # the plan

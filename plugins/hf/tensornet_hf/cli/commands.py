"""The commands of the program `tensornet`, which call functions of the library and print the results.

Most options of `compress` are fields of dataclasses; see `with_options`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from tensornet._util import compact_bytes
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import model_size
from tensornet.errors import FormatError, TargetError
from tensornet.nn import prepare_for_inference
from tensornet.nn.int4_cpu import MAX_GROWTH
from tensornet_hf.checkpoint import (
    HUB,
    check_free,
    load,
    load_gguf,
    on_device,
    read_checkpoint,
    resolve_folder,
    save,
    weight_bytes,
)
from tensornet_hf.checkpoint import decompress as make_dense
from tensornet_hf.cli.options import (
    CPU,
    GROUPS,
    Destination,
    Device,
    Dtype,
    Force,
    Json,
    JsonOutput,
    Source,
    collect,
    help_of,
    note,
    parse_pairs,
    parse_pool,
    print_json,
    print_lines,
    print_result,
    print_table,
    spelled,
    with_options,
)
from tensornet_hf.compress import (
    CompressOptions,
    OptionError,
    compress_folder,
    dtype_of,
    open_dense,
    plan_folder,
)
from tensornet_hf.embedded import data_path, gpt2_path
from tensornet_hf.evaluate import Divergence, Perplexity, divergence_by_block, perplexity, run_tasks
from tensornet_hf.exporters.base import GGUF
from tensornet_hf.exporters.target import EXPORT_TARGETS
from tensornet_hf.exporters.target import export as export_model
from tensornet_hf.imatrix import write_imatrix
from tensornet_hf.inspect import inspect_folder, inspect_specialists
from tensornet_hf.lazy_model import LazyModel, open_model
from tensornet_hf.packing import pack as pack_models
from tensornet_hf.recipes import plan_recipe
from tensornet_hf.report import display_command
from tensornet_hf.specialist_files import (
    DESCRIPTION,
    PretrainedSpecialists,
    load_specialists,
    read_description,
)
from tensornet_hf.specializing import specialize as train_specialists
from tensornet_hf.text import (
    bos_token,
    continue_text,
    load_tokenizer,
    read_text,
    require_causal,
    token_ids,
    usual_context,
)
from tensornet_hf.upcycling import upcycle as upcycle_model
from tensornet_hf.verification import TensorError
from tensornet_hf.verification import verify as verify_model

#: Prompt for the model of the demo.
PROMPT = "And it came to pass in those days, that"
#: Options of `CompressOptions` that need a compressed model or a destination.
WRITING = (
    "held_out", "refine", "heal", "workers", "resume", "report", "networks", "force",
    "dtype",
)  # fmt: skip
#: Options of recipes that have the meaning of those of `compress`.
OF_RECIPES = (
    "max_bytes", "bits_per_weight", "target_modules", "exclude_modules", "calibration", "calibration_tokens",
    "survey", "weights", "device",
)  # fmt: skip
#: Options of `pack` that have the meaning of those of `compress`.
OF_PACKS = (
    "max_bytes", "bits_per_weight", "target_modules", "exclude_modules", "formats", "calibration_tokens",
)  # fmt: skip
_FIELDS = {x.name: x for kind in (CompressionConfig, CompressOptions) for x in fields(kind)}


@with_options(CompressionConfig, CompressOptions)
def compress(
    source: Source,
    destination: Annotated[
        str, typer.Argument(help="Folder or GGUF file (.gguf) to write, or hf://owner/name to upload.")
    ],
    *,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Apply this plan: the output of tensornet plan --json, unchanged or edited.",
            metavar="FILE",
            rich_help_panel=GROUPS["budget"],
        ),
    ] = None,
    as_json: JsonOutput = False,
    **given: Any,
) -> None:
    """Compress the linear layers of a model to a given size or loss increase, and save the result.

    Example: tensornet compress MODEL SMALL --bits 4.25 --calibration text.txt

    For llama.cpp: tensornet compress MODEL m.gguf --bits 5 --calibration text.txt
    """
    options, wanted = _compress_options(given)
    if plan is not None and wanted:
        names = " and ".join(spelled(_FIELDS[name]) for name in wanted)
        raise OptionError(f"plan= already fixes the scheme of every layer; leave out {names}.")
    config = CompressionConfig(**wanted) if plan is None else CompressionPlan.load(plan)
    done = compress_folder(source, destination, config, options)
    print_result(done, as_json)
    for line in done.notes:
        note(f"note: {line}")


@with_options(CompressionConfig, CompressOptions, without=WRITING)
def plan(source: Source, *, as_json: JsonOutput = False, **given: Any) -> None:
    """Plan the number format of every layer, without compressing the model.

    Example: tensornet plan MODEL --bits 4.25 --calibration text.txt

    With --json, the output is a file for tensornet compress --plan.
    """
    options, wanted = _compress_options(given)
    print_result(plan_folder(source, CompressionConfig(**wanted), options), as_json)


@with_options(CompressionConfig, CompressOptions, only=OF_RECIPES)
def recipe(
    source: Source,
    destination: Annotated[
        Path, typer.Argument(help="File to write, for llama-quantize --tensor-type-file, such as plan.txt.")
    ],
    *,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Types of llama.cpp that the recipe may use, such as q4_k,q6_k (default: all).",
            metavar="A,B,...",
            rich_help_panel=GROUPS["budget"],
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance matrix of the model (.gguf or .dat), in place of the moments of the inputs. "
            "Without --calibration nothing is known about gradients. By default one is written.",
            metavar="FILE",
            rich_help_panel=GROUPS["data"],
        ),
    ] = None,
    as_json: JsonOutput = False,
    **given: Any,
) -> None:
    """Choose the type of every tensor for llama-quantize, which then rounds the weights.

    Example: tensornet recipe MODEL plan.txt --max-bytes 5GB --calibration text.txt

    --max-bytes is the size of the GGUF file. Without --imatrix, the importance matrix that llama-quantize
    needs is written too, here to plan.imatrix.gguf.
    """
    options, wanted = _compress_options(given)
    made = plan_recipe(
        source,
        **wanted,
        imatrix=imatrix,
        formats=formats.split(",") if formats else (),
        **{name: getattr(options, name) for name in (*OF_RECIPES[4:], "progress")},
    )
    importance = imatrix
    if importance is None:
        importance = destination.with_suffix(".imatrix.gguf")
        write_imatrix(importance, made.importance, source=options.source)
    made.save(destination)
    command = made.command(str(destination), str(importance))
    if as_json:
        print_json({**made.to_dict(), "command": command})
        return
    print_lines(
        str(made),
        "",
        command,
        "",
        "llama-quantize must be built from sources of July 2026 or later (pull request 25716): older builds "
        "ignore the file together with --pure.",
    )


def _compress_options(given: Mapping[str, Any]) -> tuple[CompressOptions, dict[str, Any]]:
    """Convert the values of options to `CompressOptions` and to arguments of `CompressionConfig`."""
    command = display_command(["tensornet", *sys.argv[1:]])
    chosen = collect(CompressOptions, given)
    if chosen.get("device", "cpu") == "cpu":
        chosen.setdefault("workers", torch.get_num_threads())  # normally the number of cores
    options = CompressOptions(**chosen, command=command, progress=sys.stderr.isatty())
    return options, collect(CompressionConfig, given)


def inspect(path: Source, as_json: Json = False) -> None:
    """List the layers of a saved model with their topologies, number formats and sizes.

    For a folder of specialists, the sizes of the specialists are listed. No weights are loaded.
    """
    folder = resolve_folder(path)
    specialists = (folder / DESCRIPTION).is_file()
    found = inspect_specialists(folder) if specialists else inspect_folder(folder)
    if as_json:
        print_json(found)
        return
    if specialists:
        sizes = [(x, f"{n:,}") for x, n in found["specialists"].items()]
        print_lines(f"specialists of {found['trunk'] or 'an unknown trunk'}: {found['layers']} layers", "")
        if found["next"] is None:
            print_table(("packed model", "bytes"), sizes)
            return
        print_table(("specialist", "bytes"), [*sizes, ("the next one", f"{found['next']:,}")])
        print_lines(f"shared cores: {found['shared']:,} bytes")
        return
    version, size = found["format_version"], compact_bytes(found["bytes"])
    form = "not compressed" if version is None else f"tensornet format {version}"
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    print_lines(
        f"{found['architecture']}, {form}",
        f"whole model: {found['params']:,} parameters ({dtypes}), weight files {size}",
    )
    rows = []
    for layer in found["layers"]:
        dense, stored = layer["dense_params"], f"{layer['params']:,}"
        if not layer["params"]:  # the cores are stored under another name
            owners = (owner for name, owner in found["ties"].items() if name.startswith(f"{layer['name']}."))
            stored = f"as {next(owners, 'another layer').rpartition('.')[0] or 'another layer'}"
        rows.append(
            (
                layer["name"],
                layer["form"],
                "" if layer["shape"] is None else f"{layer['shape'][0]} x {layer['shape'][1]}",
                f"{layer['bytes']:,}" if layer["params"] else "",
                f"{8 * layer['bytes'] / dense:.2f}" if dense and layer["params"] else "",
                stored,
                layer["dtype"] or "",
            )
        )
    if rows:
        print_lines("")
        header = ("layer", "scheme", "shape", "bytes", "bits a weight", "parameters", "dtype")
        print_table(header, rows)


def verify(
    path: Annotated[Path, typer.Argument(help="Folder or GGUF file that compress or export has written.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="Dense model (folder or hub id) that it was made of: compare every tensor with it, one at a "
            "time."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="GGUF file with the weights of --source.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the files of a written model against its receipt, and its weights against the original.

    Example: tensornet verify SMALL --source MODEL
    """
    if weights is not None and source is None:
        raise typer.BadParameter("--weights are those of --source; add --source FOLDER.")
    found = verify_model(path, source, weights=weights)
    if as_json:
        print_json(found.to_dict())
    else:
        rows = [(x.name, x.scheme, f"{x.error:.6f}", _explained(x)) for x in found.tensors]
        if rows:
            print_table(("tensor", "scheme", "error", "explained"), rows)
            print_lines("")
        print_lines(str(found))
    if found.unexplained:
        raise FormatError(
            f"{len(found.unexplained)} tensors of {path} are further from {source} than its receipt explains."
        )


def _explained(tensor: TensorError) -> str:
    return "trained" if tensor.largest is None else f"{tensor.largest:.6f}"


def evaluate(
    path: Annotated[
        str, typer.Argument(help="Model folder, GGUF file, or hub id if there is no such folder or file.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file (UTF-8) on which the perplexity is measured. Several files are listed worst "
            "first."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Dense model (folder, GGUF file or hub id); the Kullback-Leibler divergence from this model "
            "is measured on --text."
        ),
    ] = None,
    specialist: Annotated[
        str | None, typer.Option(help="Specialist to measure, of a folder of specialists.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, separated by commas, as in arc_easy,hellaswag."),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="Your own task file, or a folder of task files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions of each task (default: all).")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens in a window of --text (default: the context length of the model, at most "
            "1024)."
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Largest number of windows or questions in a batch.")
    ] = 16,
    device: Device = CPU,
    as_json: Json = False,
) -> None:
    """Measure a language model: perplexity of a text, scores in tasks, or both."""
    if not text and tasks is None:
        raise typer.BadParameter(
            "Say what to measure: --text FILE (perplexity) or --tasks NAMES (lm-evaluation-harness)."
        )
    if reference is not None and not text:
        raise typer.BadParameter("--reference compares predictions on a text; add --text FILE.")
    for needed, chosen, options in (
        ("--tasks NAMES", tasks, {"--task-path": task_path, "--limit": limit}),
        ("--text FILE", text or None, {"--context": context}),
    ):
        if unused := [name for name, value in options.items() if value is not None and chosen is None]:
            raise typer.BadParameter(f"Add {needed}, or leave out {' and '.join(unused)}.")
    contents = {path: read_text(path) for path in text or ()}
    other = None if reference is None else resolve_folder(reference)
    model: Any
    folder, specialists, lazy = resolve_folder(path), None, None
    if other is not None and tasks is None and not (folder / DESCRIPTION).is_file():
        lazy = _opened_lazily(folder, other)
    if lazy is not None:
        model = lazy.model
    else:
        model, folder, specialists = _opened(path, device, specialist)
    if specialists is not None and specialist is None:
        raise typer.BadParameter(
            f"{path} is a folder of specialists; add --specialist with one of {', '.join(specialists.names)}."
        )
    using = nullcontext() if specialists is None else specialists.use(specialist)
    tokenizer = load_tokenizer(_folder_of_text(folder, specialists, specialist))
    found: dict[str, Any] = {}
    with using:
        measured: dict[Path, Perplexity | Divergence] = {}
        if contents:
            require_causal(model)
            windows: dict[str, Any] = {"batch_size": batch, "bos": bos_token(tokenizer)}
            windows["progress"] = sys.stderr.isatty()
            windows["context"] = usual_context(model) if context is None else context
            dense = None if other is None else _opened_lazily(other) or _loaded(other, device)
        for file, content in contents.items():
            ids = token_ids(tokenizer, content)
            measured[file] = (
                perplexity(model, ids, **windows)
                if dense is None
                else divergence_by_block(lazy or model, dense, ids, device=device, **windows)
            )
        worst_first = sorted(measured.items(), key=lambda item: _damage(item[1]), reverse=True)
        records = [_text_record(file, x, reference) for file, x in worst_first]
        found |= records[0] if len(records) == 1 else {"texts": records} if records else {}
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            scores = run_tasks(model, tokenizer, names, task_path=task_path, limit=limit, batch_size=batch)
            found["tasks"] = asdict(scores)
    if as_json:
        print_json({"model": path, **found})
        return
    if len(records) == 1:
        ((_, result),) = worst_first
        print_lines(f"perplexity {found['perplexity']:.4f}", f"loss {found['loss']:.5f}")
        print_lines(*(str(result).splitlines() if isinstance(result, Divergence) else ()), found["how"])
    elif records:
        _print_texts(records)
    if tasks is not None:
        rows = []
        for task, values in scores.scores.items():
            for metric, value in values.items():
                name, comma, rest = metric.partition(",")
                if not name.endswith("_stderr"):
                    error = values.get(f"{name}_stderr{comma}{rest}")
                    shown = "" if error is None else f"{error:.4f}"
                    rows.append((task, metric, f"{value:.4f}", shown, f"{scores.samples.get(task, 0):,}"))
        print_table(("task", "metric", "score", "standard error", "examples"), rows)
        print_lines(f"lm-evaluation-harness {scores.version}")


def _damage(measured: Perplexity | Divergence) -> float:
    """Return what texts are ordered by: the mean divergence, or the loss if there is no reference model."""
    return measured.mean[0] if isinstance(measured, Divergence) else measured.loss


def _text_record(text: Path, measured: Perplexity | Divergence, reference: str | None) -> dict[str, Any]:
    """Describe what was measured on a text, for `--json`."""
    found: dict[str, Any] = {}
    own = measured
    if isinstance(measured, Divergence):
        own, compared = measured.perplexity, asdict(measured)
        del compared["perplexity"]  # it is added below
        found["divergence"] = {"reference": reference, **compared}
    assert isinstance(own, Perplexity)
    return {**found, "text": str(text), **asdict(own), "how": f"{own.how} of {text.name}"}


def _print_texts(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each text, in the given order."""
    compared = {"KL divergence": "mean", "loss increase": "loss_increase", "same top token": "same_top"}
    divergent = "divergence" in records[0]
    rows = []
    for record in records:
        pairs = [record["divergence"][name] for name in compared.values()] if divergent else []
        rows.append(
            (
                record["text"],
                *(f"{value:.4f} +- {error:.1g}" for value, error in pairs),
                f"{record['loss']:.4f}",
                f"{record['perplexity']:.3f}",
                f"{record['tokens']:,}",
            )
        )
    print_table(("text", *(compared if divergent else ()), "loss", "perplexity", "tokens"), rows)


def _opened(
    path: str, device: torch.device, specialist: str | None
) -> tuple[PreTrainedModel, Path, PretrainedSpecialists | None]:
    """Load a model folder, a GGUF file, or a folder of specialists with its trunk.

    Returns:
        The model, the folder of its tokenizer, and the specialists, if there are any.
    """
    folder = resolve_folder(path)
    if (folder / DESCRIPTION).is_file():
        found = load_specialists(folder)
        trunk = resolve_folder(read_description(folder).trunk or "")
        return on_device(found.model, device), trunk, found
    if specialist is not None:
        raise typer.BadParameter(f"{path} is not a folder of specialists; leave out --specialist.")
    return _loaded(folder, device), folder, None


def _folder_of_text(folder: Path, specialists: PretrainedSpecialists | None, name: str | None) -> Path:
    """Return the folder with the tokenizer for a specialist: its own, otherwise that of the trunk."""
    return folder if specialists is None or name is None else specialists.tokenizers.get(name, folder)


def _opened_lazily(path: Path, folder: Path | None = None) -> LazyModel | None:
    """Open a model to be run block by block; None if it is compressed, or can only be loaded as a whole.

    Args:
        path: a model folder or a GGUF file.
        folder: folder with the configuration of the model in the GGUF file.
    """
    if path.suffix == GGUF and (folder is None or folder.suffix == GGUF):
        return None
    if path.suffix != GGUF and read_checkpoint(path).compression is not None:
        return None
    try:
        return open_model(path) if path.suffix != GGUF else open_model(folder or path, path, quantized=True)
    except (FormatError, TargetError) as error:
        note(f"note: {path} is loaded as a whole: {error}")
        return None


def _loaded(path: Path, device: torch.device) -> PreTrainedModel:
    """Load a model folder or a GGUF file."""
    if path.suffix != GGUF:
        return on_device(load(path), device)
    return on_device(load_gguf(path), device)


def generate(
    path: Source,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    specialist: Annotated[
        str | None,
        typer.Option(
            help="Specialist of a folder of specialists (default: the one that finds the prompt most likely, "
            "or the trunk alone)."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest length of the continuation in tokens.")] = 60,
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Format the prompt as a user message with the tokenizer's chat template (default: if it "
            "has one).",
            show_default=False,
        ),
    ] = None,
    device: Device = CPU,
    as_json: Json = False,
) -> None:
    """Let a model continue a prompt; an encoder-decoder or a chat model answers the prompt instead.

    Example: tensornet generate SMALL "In the beginning"

    Each token is the most likely one.
    """
    model, folder, specialists = _opened(path, device, specialist)
    tokenizer = load_tokenizer(folder)
    using: AbstractContextManager[None] = nullcontext()
    if specialists is not None:
        if specialist is None:
            [specialist] = specialists.choose(input_ids=tokenizer(prompt, return_tensors="pt").input_ids)
        using = specialists.use(specialist)
        if (own := _folder_of_text(folder, specialists, specialist)) != folder:
            tokenizer = load_tokenizer(own)
            if (own / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = GenerationConfig.from_pretrained(own)
    prepare_for_inference(model, max_growth=MAX_GROWTH)  # limit memory: large layers stay compressed
    chat = bool(tokenizer.chat_template) if chat is None else chat
    with using:
        text = continue_text(
            model,
            tokenizer,
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
        )
    if as_json:
        options = {"chat": chat, "max_new_tokens": max_new_tokens}
        print_json({"model": path, "prompt": prompt, "text": text, **options})
    elif chat or model.config.is_encoder_decoder:
        print_lines(text)
    else:
        print_lines(prompt + text)


def decompress(
    source: Source,
    destination: Destination,
    dtype: Dtype = None,
    device: Device = CPU,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert a compressed model to an ordinary model, which loads without this library.

    Weights are those of the compressed model: the errors of compression remain.
    """
    stored = dtype_of(dtype)
    folder = resolve_folder(source)
    check_free(destination, force=force, sources=(folder,))
    if read_checkpoint(folder).compression is None:
        raise TargetError(f"{folder} is an ordinary model; there is nothing to decompress.")
    model = on_device(load(folder), device)
    before, _ = model_size(model)
    make_dense(model)
    if stored is not None:
        torch.nn.Module.to(model, dtype=stored)
    save(model, destination, source=folder, force=force)
    after, _ = model_size(model)
    size = None if destination.startswith(HUB) else weight_bytes(destination)
    if as_json:
        numbers = {"params_before": before, "params_after": after, "file_bytes_after": size}
        print_json({"source": source, "destination": destination, **numbers})
    else:
        files = "" if size is None else f", weight files {compact_bytes(size)}"
        print_lines(
            f"{before:,} -> {after:,} parameters of the whole model{files}", f"written to {destination}"
        )


def export(
    source: Source,
    destination: Annotated[Path, typer.Argument(help="File (.gguf) or folder to write.")],
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help=f"Format to write: {', '.join(EXPORT_TARGETS)} (default: gguf if the destination ends in "
            ".gguf). For a specialist: peft (the default), gguf, mlx; with --whole, a folder for "
            "transformers by default.",
        ),
    ] = None,
    specialist: Annotated[
        str | None,
        typer.Option(help="Specialist of a folder of specialists, which becomes a LoRA adapter."),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Write the specialist as a model of its own instead, with dense weights."
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(help="Largest rank of the adapter, to which changes are truncated (default: exact)."),
    ] = None,
    networks: Annotated[
        str,
        typer.Option(
            help="How to write tensor networks: as dense weights (dense); low-rank matrices that are added "
            "to integers as a LoRA adapter, all others as dense weights (lora); or not at all, with an error "
            "(refuse)."
        ),
    ] = "dense",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, with exactly the same weights.

    Layers that the target cannot store are written as dense weights, and are listed.

    One of several specialists: tensornet export SPECIALISTS law-lora --specialist law
    """
    folder = resolve_folder(source)
    if whole and rank is not None:
        raise typer.BadParameter("--rank is for adapters; leave it out, or leave out --whole.")
    if (folder / DESCRIPTION).is_file() or specialist is not None:
        if specialist is None or networks != "dense":
            raise typer.BadParameter(
                "A specialist is exported as a LoRA adapter or, with --whole, as a model: give --specialist "
                "NAME, and leave out --networks."
            )
        _, trunk, specialists = _opened(source, CPU, specialist)
        assert specialists is not None  # otherwise an option that needs specialists was refused
        place = _folder_of_text(trunk, specialists, specialist)
        options: Any = {"target": target, "source": place, "force": force}
        if whole:
            made = specialists.unpack(specialist, destination, **options)
        else:
            made = specialists.export(specialist, destination, rank=rank, **options)
        facts = {"model" if whole else "adapter": str(made)}
        print_json(facts) if as_json else print_lines(f"written to {made}")
        return
    if whole or rank is not None:
        raise typer.BadParameter("--whole and --rank are for a folder of specialists; leave them out.")
    words: Any = {"networks": networks}  # checked by the function
    print_result(export_model(source, destination, target=target, force=force, **words), as_json)


def upcycle(
    source: Source,
    destination: Annotated[
        str | None,
        typer.Argument(help="Folder to write, or hf://owner/name to upload (default: only show the sizes)."),
    ] = None,
    experts: Annotated[int, typer.Option(help=help_of(upcycle_model, "experts"))] = 8,
    top_k: Annotated[int | None, typer.Option(help=help_of(upcycle_model, "top_k"))] = None,
    share: Annotated[str | None, typer.Option(help=help_of(upcycle_model, "share"))] = None,
    pool: Annotated[
        str | None,
        typer.Option(help=help_of(upcycle_model, "pool"), metavar="all|N", parser=parse_pool),
    ] = None,
    router: Annotated[str, typer.Option(help=help_of(upcycle_model, "router"))] = "topk",
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help=f"{help_of(upcycle_model, 'target_modules')} Repeatable.", metavar="PATTERN"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Another argument of tensornet_hf.upcycle, such as noise=0.05. Repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = CPU,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert a dense model to a mixture of experts, ready to be trained.

    Example: tensornet upcycle MODEL MIXTURE --share center --experts 8 --top-k 2

    With a pool: tensornet upcycle MODEL MIXTURE --pool all --experts 32

    Without --pool, or with --share none, the mixture initially computes the same as the dense model.
    """
    words: dict[str, Any] = {
        "experts": experts,
        "top_k": top_k,
        "share": share,
        "pool": pool,
        "router": router,
    }
    words |= {"target_modules": target_modules, **parse_pairs("--option", option)}
    stored, folder = dtype_of(dtype), resolve_folder(source)
    if destination is not None:
        check_free(destination, force=force, sources=(folder,))
    model = on_device(open_dense(folder), device)
    try:
        report = upcycle_model(model, **words, progress=sys.stderr.isatty())
    except TypeError as error:  # an unknown name, or a value of another type
        raise typer.BadParameter(str(error)) from error
    if destination is not None:
        if stored is not None:
            torch.nn.Module.to(model, dtype=stored)
        save(model, destination, source=folder, force=force)
    if as_json:
        print_json({"source": source, "destination": destination, **report.to_dict()})
        return
    rows = [
        (x.name, f"{x.dense_params:,}", f"{x.params:,}", f"{x.shared_params:,}", f"{x.error:.1e}")
        for x in report.layers
    ]
    print_table(("network", "dense", "mixture", "shared", "error"), rows)
    print_lines(str(report), *([] if destination is None else [f"written to {destination}"]))


def specialize(
    source: Source,
    destination: Annotated[Path, typer.Argument(help="New folder, or folder of specialists to add to.")],
    domain: Annotated[
        list[str],
        typer.Option(help="Name of a specialist and its text file. Repeatable.", metavar="NAME=FILE"),
    ],
    share: Annotated[
        str,
        typer.Option(help="What the specialists share: ends, in, out, center, or none (LoRA)."),
    ] = "ends",
    rank: Annotated[int, typer.Option(help="Rank of the changes.")] = 32,
    steps: Annotated[int, typer.Option(help="Largest number of training steps for each domain.")] = 400,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate (default: the best one in short trials).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of windows in a batch.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(help="Number of tokens in a window (default: context of the model, at most 512)."),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Do not continue an interrupted run; delete its files.")
    ] = False,
    device: Device = CPU,
    as_json: Json = False,
) -> None:
    """Train a small specialist for each domain on a frozen model; all share their large cores.

    Example: tensornet specialize MODEL DST --domain law=law.txt --domain code=code.txt

    Again with another --domain, it adds a specialist, and leaves the others unchanged.
    """
    report = train_specialists(
        source,
        destination,
        {name: str(file) for name, file in parse_pairs("--domain", domain).items()},
        share=share,  # type: ignore[arg-type]  # checked by the function
        rank=rank,
        steps=steps,
        lr=lr,
        batch_size=batch,
        context=context,
        resume=not no_resume,
        device=device,
        progress=sys.stderr.isatty() and not as_json,
    )
    if as_json:
        print_json({"source": source, "destination": str(destination), **report.to_dict()})
        return
    print_lines(str(report), f"written to {destination}")


@with_options(CompressionConfig, CompressOptions, only=OF_PACKS)
def pack(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the base.", metavar="BASE")],
    destination: Annotated[Path, typer.Argument(help="New folder, or pack of this base to add to.")],
    model: Annotated[
        list[str],
        typer.Option(
            help="Name of a fine-tuned model and its folder or LoRA adapter. Repeatable.",
            metavar="NAME=FOLDER",
        ),
    ],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text like the later input of all models, or of one (default: a mixed text of the package). "
            "Repeatable.",
            metavar="[NAME=]FILE",
            rich_help_panel=GROUPS["data"],
        ),
    ] = None,
    shared_budget: Annotated[
        bool,
        typer.Option(
            "--shared-budget",
            help="The budget is for all models of this call together (default: for each).",
            rich_help_panel=GROUPS["budget"],
        ),
    ] = False,
    surveys: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the survey of each model, which takes most of the time: read if it exists, "
            "written otherwise.",
            rich_help_panel=GROUPS["data"],
        ),
    ] = None,
    *,
    as_json: JsonOutput = False,
    **given: Any,
) -> None:
    """Store fine-tuned models as small changes of one base.

    Example: tensornet pack BASE DST --model law=MY-LAW --calibration law=law.txt --bits 0.5

    Again with another --model, it adds a model, and leaves the others unchanged. Use the models with
    tensornet generate DST --specialist law.
    """
    models = {name: str(folder) for name, folder in parse_pairs("--model", model).items()}
    wanted = collect(CompressionConfig, given)
    report = pack_models(
        source,
        destination,
        models,
        CompressionConfig(**wanted) if wanted else None,
        calibration=_texts_of(models, calibration or ["default"]),
        calibration_tokens=given.get("calibration_tokens"),
        shared_budget=shared_budget,
        surveys=surveys,
        progress=sys.stderr.isatty() and not as_json,
    )
    print_result(report, as_json)


def _texts_of(models: Iterable[str], given: Sequence[str]) -> str | dict[str, str]:
    """Parse the texts of `pack`: one for all models, or `NAME=FILE` for each."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    found = {name: str(file) for name, file in parse_pairs("--calibration", given).items()}
    if wrong := sorted(found.keys() ^ set(models)):
        raise typer.BadParameter(
            "Give one --calibration FILE for all models, or NAME=FILE for each of "
            f"{', '.join(models)}; check {', '.join(wrong)}."
        )
    return found


def demo(
    destination: Annotated[Path, typer.Argument(help="Folder for the model and the report.")] = Path(
        "demo_out"
    ),
    device: Device = CPU,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress a small trained GPT-2, measure, save and load it, and write a report."""
    destination.mkdir(parents=True, exist_ok=True)
    folder, report = destination / "model", destination / "report.html"
    options = CompressOptions(
        calibration=data_path("calibration.txt"),
        calibration_tokens=16_384,
        held_out=data_path("heldout.txt"),  # in neither the training nor the calibration text
        device=device,
        report=report,
        force=force,
        command=display_command(["tensornet", *sys.argv[1:]]),
        progress=sys.stderr.isatty(),
    )
    done = compress_folder(gpt2_path(), folder, CompressionConfig(bits_per_weight=4.25), options)
    # Load the folder with transformers, as users do after importing tensornet_hf.
    loaded = on_device(AutoModelForCausalLM.from_pretrained(folder), device)
    sample = continue_text(loaded, load_tokenizer(folder), PROMPT, temperature=0.7)
    if as_json:
        files = {"folder": str(folder), "report": str(report)}
        print_json({**done.to_dict(), **files, "prompt": PROMPT, "sample": sample})
        return
    rows: list[tuple[str, ...]] = []
    for model in done.models:
        quality = model.quality
        assert quality is not None  # the demo measures every model
        rows.append(
            (
                f"{model.name}, {model.scheme}" if model.scheme else model.name,
                compact_bytes(model.bytes or 0),
                f"{model.bits:.2f}",
                f"{model.params:,}",
                f"{model.perplexity:.2f}",
                f"{quality.mean:+.4f}" if rows else "",
            )
        )
    print_table(("", "bytes", "bits a weight", "parameters", "perplexity", "loss increase"), rows)
    assert quality is not None
    print_lines(
        "",
        f"Loss in nats per token, on held-out text: {quality.tokens:,} tokens scored on {quality.source}.",
        "Bytes and parameters are those of the whole model, bits a weight those of the compressed layers.",
        "Both include scales.",
        "The baselines use one format or ratio for all layers and are not saved; GPTQ is our implementation.",
        "",
        f"The saved model writes: {PROMPT}{sample}".replace("\n", "\n  "),
        "",
        f"Model:  {folder} (import tensornet_hf, then AutoModelForCausalLM.from_pretrained)",
        f"Report: {report} (open it in a browser)",
    )

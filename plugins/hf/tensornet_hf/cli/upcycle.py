"""`tensornet upcycle`: convert the feed-forward networks of a model to mixtures of experts."""

from typing import Annotated

import typer

from tensornet_hf.cli import options as shared
from tensornet_hf.cli.values import parse_share
from tensornet_hf.pipeline import upcycle_folder
from tensornet_hf.upcycling import MoEConfig, UpcycleReport


def run(
    source: shared.Source,
    destination: shared.NewFolder = None,
    experts: Annotated[int, typer.Option(help="Experts of each network.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts for each token, with --router topk.")] = 1,
    router: Annotated[str, typer.Option(help="switch, topk or expert_choice (encoders only).")] = "switch",
    share: Annotated[
        list[str] | None,
        typer.Option("--shared", help="center, ends, none, all, or a core's name; repeatable for names."),
    ] = None,
    across: Annotated[
        bool,
        typer.Option(
            "--share-across-layers",
            help="One owner of the shared cores for all layers of one shape; such a model must be trained.",
        ),
    ] = False,
    topology: Annotated[str, typer.Option(help="Family of networks.")] = "mpo",
    sites: Annotated[int | None, typer.Option(help="Cores of a chain. [default: 5]")] = None,
    max_bond: Annotated[int | None, typer.Option(help="Largest bond. [default: exact]")] = None,
    rel_error: Annotated[float | None, typer.Option(help="Largest error of each weight.")] = None,
    param_ratio: Annotated[
        float | None,
        typer.Option(
            parser=parse_share, metavar="SHARE", help="Share of a weight's parameters that one expert has."
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Relative noise on private cores.")] = 0.0,
    aux_loss_coef: Annotated[float, typer.Option(help="Weight of the load-balancing loss.")] = 0.01,
    z_loss_coef: Annotated[float, typer.Option(help="Weight of the router z-loss.")] = 0.0,
    capacity_factor: Annotated[
        float | None, typer.Option(help="Slots of an expert relative to an even load. [default: no limit]")
    ] = None,
    jitter: Annotated[float, typer.Option(help="Noise on what routers see in training.")] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Networks to change: name, end of a name, glob, or re:REGEX; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of routers and noise.")] = 0,
    dtype: shared.Dtype = None,
    device: shared.Device = shared.CPU,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the sizes, write nothing.")] = False,
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Turn a dense model into a mixture of experts that share cores, ready to be trained.

    Every expert starts as the dense network, so that the new model computes what the old one did.
    """
    config = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        router=router,
        shared=_shared(share),
        share_across_layers=across,
        topology=topology,
        sites=sites,
        max_bond=max_bond,
        rel_error=rel_error,
        param_ratio=param_ratio,
        noise=noise,
        aux_loss_coef=aux_loss_coef,
        z_loss_coef=z_loss_coef,
        capacity_factor=capacity_factor,
        jitter=jitter,
        target_modules=target or None,
        seed=seed,
    )
    if destination is None and not dry_run:
        raise typer.BadParameter("Name a destination, or ask for --dry-run.")
    written = None if dry_run else destination
    report = upcycle_folder(source, written, config, dtype=dtype, device=device, force=force, progress=True)
    if as_json:
        shared.print_json({"source": source, "destination": written, **report.to_dict()})
    else:
        _show(report, written)


def _shared(names: list[str] | None) -> str | list[str]:
    if not names:
        return "center"
    keyword = len(names) == 1 and names[0] in ("center", "ends", "none", "all")
    return names[0] if keyword else names


def _show(report: UpcycleReport, destination: str | None) -> None:
    rows = [
        (
            layer.name,
            f"{layer.dense_params:,}",
            f"{layer.params:,}",
            f"{layer.shared_params:,}",
            f"{layer.error:.1e}",
        )
        for layer in report.layers
    ]
    shared.print_table(("network", "dense", "mixture", "of it shared", "error"), rows)
    shared.print_lines(str(report))
    if destination is not None:
        shared.print_lines(f"written to {destination}")

"""Build the wheel, look into it, and install it in empty environments away from the checkout.

Installing PyTorch is most of the cost, so it is done once: one environment holds the core alone, and
each extra gets a thin environment of its own that sees the core's packages through a .pth file and
holds nothing but what the extra added. So every extra is tested alone on top of the core, none can
borrow a package from another, and the whole takes little more time and disk than the core does.

Run by ``make wheel-test``; needs nothing but pip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {
    "tensornet": ROOT / "tensornet",
    "tensornet_moe": ROOT / "plugins" / "moe" / "tensornet_moe",
    "tensornet_hf": ROOT / "plugins" / "hf" / "tensornet_hf",
}
HF_HINT = "pip install 'tensornet-torch[hf]'"
CLI_HINT = "pip install 'tensornet-torch[cli]'"


@dataclass(frozen=True)
class Extra:
    """An extra: modules that only it brings, and a program that works with it."""

    modules: tuple[str, ...]
    program: str


EXTRAS = {
    "hf": Extra(("transformers", "accelerate"), "import tensornet_hf"),
    "viz": Extra(("matplotlib",), "import matplotlib.pyplot, jinja2"),
    "paths": Extra(("cotengra",), "import cotengra"),
    "interop": Extra(("quimb", "tensorly"), "import quimb.tensor, tensorly"),
    "testing": Extra(
        ("hypothesis",), "from tensornet.testing.strategies import register_profiles; register_profiles()"
    ),
    "gguf": Extra(("gguf", "conversion", "libgguf"), "import tensornet_hf.exporters.gguf"),
    "cli": Extra(("typer", "rich", "transformers", "matplotlib"), "import tensornet_hf"),
}


class Environment:
    """A virtual environment, run with its own interpreter from an empty directory."""

    def __init__(self, path: Path, *, on_top_of: Environment | None = None) -> None:
        venv.create(path, with_pip=on_top_of is None, symlinks=True)
        self.path = path
        self.python = path / "bin" / "python"
        self.pip = [
            str(on_top_of.python if on_top_of else self.python),
            "-m",
            "pip",
            "--python",
            str(self.python),
        ]
        self.empty = path / "empty"
        self.empty.mkdir()
        (self.packages,) = path.glob("lib/python*/site-packages")
        if on_top_of is not None:
            (self.packages / "core.pth").write_text(f"{on_top_of.packages}\n")

    def install(self, wheel: Path, extra: str | None = None) -> None:
        requirement = f"{wheel}[{extra}]" if extra else str(wheel)
        subprocess.run([*self.pip, "install", "--quiet", requirement], check=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        # -I and the empty directory: neither PYTHONPATH nor a working directory can lend the checkout.
        return subprocess.run(
            [str(self.python), "-I", *command], cwd=self.empty, capture_output=True, text=True, timeout=300
        )

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", "from tensornet._entry import main; main()", *arguments)


def check(condition: bool, claim: str, detail: str = "") -> None:
    """Report a claim; end with status 1 and the detail when it does not hold."""
    print(f"  {'ok ' if condition else 'NOT'} {claim}", flush=True)
    if not condition:
        raise SystemExit(f"wheel check failed: {claim}\n{detail}")


def build(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def tracked_files(folder: Path) -> set[str]:
    """Files of a package that git knows, relative to the package; what is ignored stays out of the wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."]
    listed = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {name for name in listed if (folder / name).is_file()}


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    info = {name for name in top if name.endswith(".dist-info")}
    check(
        top - info == set(PACKAGES), "holds the three packages and nothing else", f"top level: {sorted(top)}"
    )
    for package, folder in PACKAGES.items():
        expected = {f"{package}/{name}" for name in tracked_files(folder)}
        missing, surplus = expected - names, {n for n in names - expected if n.startswith(f"{package}/")}
        check(
            not missing and not surplus,
            f"{package}: all {len(expected)} files, data included",
            f"missing {sorted(missing)}, surplus {sorted(surplus)}",
        )
        check(f"{package}/py.typed" in names, f"{package}: py.typed")
    check(any(name.endswith("licenses/LICENSE") for name in names), "holds the licence")


def check_core(core: Environment) -> None:
    done = core.run("-c", "import tensornet, tensornet_moe; print(tensornet.__file__)")
    check(done.returncode == 0, "import tensornet, tensornet_moe", done.stderr)
    check(str(core.path) in done.stdout, "imported from the environment, not from the checkout", done.stdout)
    done = core.run("-c", "import tensornet_hf")
    last = (done.stderr.strip().splitlines() or [""])[-1]
    check(done.returncode != 0 and HF_HINT in last, "import tensornet_hf names the pip command", done.stderr)
    check_command_refuses(core)
    script = subprocess.run([core.path / "bin" / "tensornet"], cwd=core.empty, capture_output=True, text=True)
    check(
        script.returncode == 1 and CLI_HINT in script.stderr,
        "the installed script says the same",
        script.stderr,
    )
    for module in sorted({module for extra in EXTRAS.values() for module in extra.modules}):
        check(core.run("-c", f"import {module}").returncode != 0, f"no {module} yet")


def check_command_refuses(environment: Environment) -> None:
    done = environment.command("--help")
    lines = done.stderr.strip().splitlines()
    check(
        done.returncode == 1 and len(lines) == 1 and CLI_HINT in lines[0],
        "command tensornet: one line with the pip command, status 1",
        done.stdout + done.stderr,
    )


def check_extra(name: str, environment: Environment) -> None:
    extra = EXTRAS[name]
    for program in (*(f"import {module}" for module in extra.modules), extra.program, "import tensornet_moe"):
        done = environment.run("-c", program)
        check(done.returncode == 0, program, done.stderr)
    if name == "cli":
        done = environment.command("--help")
        check(
            done.returncode == 0 and "compress" in done.stdout, "tensornet --help", done.stdout + done.stderr
        )
    else:
        check_command_refuses(environment)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", nargs="*", choices=[*EXTRAS], default=[*EXTRAS], help="only these")
    chosen = parser.parse_args(arguments).extras
    with tempfile.TemporaryDirectory(prefix="tensornet-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        print(f"{wheel.name}, {wheel.stat().st_size:,} bytes")
        check_contents(wheel)
        print("core alone")
        core = Environment(folder / "core")
        core.install(wheel)
        check_core(core)
        for extra in chosen:
            print(f"core and [{extra}]")
            environment = Environment(folder / extra, on_top_of=core)
            environment.install(wheel, extra)
            check_extra(extra, environment)
    print("The wheel is sound.")


if __name__ == "__main__":
    main()

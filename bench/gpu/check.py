"""Run the GPU tests, then measure every goal of the GPU path, on a machine with a GPU and no network.

    make gpu-check [OUT=folder]        which runs: python3 bench/gpu/check.py --out folder

creates a virtual environment on top of the installed packages, installs what is missing from ./wheels, runs the tests
and `bench.gpu.serving_check`, and writes tests.log, goals.log, goals.json (what that measured) and check.json to the
folder. The last line printed is check.json's: counts of tests, and every goal with its value. Together it takes under
eight minutes. Exit status: 0 if all tests passed and everything was measured, 1 if not, 2 if packages are missing, 3 if
there is no GPU. Imports only the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import site
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES, NO_GPU = 2, 3
TEST_PACKAGES = {"pytest", "pytest-timeout", "pytest-asyncio", "hypothesis", "aiohttp", "peft"}
GPU_NAME = """
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"PyTorch cannot be imported by {sys.executable} ({error})")
if not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} sees no GPU here")
print(torch.cuda.get_device_name())
"""
PLUGINS = ("pytest_timeout", "pytest_asyncio.plugin")  # no other installed plugins are loaded
LATE = 60.0  # seconds by which a part may take longer than estimated
WORKERS = 4  # test processes, if pytest-xdist is installed: most of the time goes into compiling


def requirements(project: Mapping[str, Any]) -> list[str]:
    """Packages that tests and benchmark need, with version ranges, from pyproject.toml's `project` table."""
    extra = project["optional-dependencies"]["test"]
    return [*project["dependencies"], *(each for each in extra if re.split(r"[^\w-]", each)[0] in TEST_PACKAGES)]


def environment(folder: Path, version: str) -> Path:
    """Create a virtual environment with this checkout, its own packages, and those of the running Python; its Python.

    The running Python's packages are added by path, because a virtual environment inside another one does not see them.
    The checkout is added by path and metadata, because installing it needs further packages.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    outer = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    outer += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    lines = [str(ROOT), *(f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(outer))]
    (own / "outer.pth").write_text("\n".join(lines) + "\n")
    about = own / f"lora_serve-{version}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lora-serve\nVersion: {version}\n")
    return python


def install(python: Path, wheels: Path, needed: Sequence[str]) -> bool:
    """Install missing packages from the wheels only; returns whether all are installed."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    command += ["--no-warn-conflicts", *needed]
    source = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_ROOT_USER_ACTION": "ignore"}
    return subprocess.run(command, env={**os.environ, **source}).returncode == 0


def run(command: Sequence[str], log: Path, seconds: float) -> int:
    """Run a command, copying its output to a log; returns its exit status, or 124 after `seconds`."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["LORA_SERVE_TEST_DEVICE"] = "cuda"
    variables |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file, subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE) as tee:
        file.close()
        streams = {"stdout": tee.stdin, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **streams) as process:
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with its child processes
                status = 124
        assert tee.stdin is not None
        tee.stdin.close()
    return status


def tests(python: Path) -> list[str]:
    """The command that runs the GPU tests."""
    parallel = subprocess.run([str(python), "-c", "import xdist"], capture_output=True).returncode == 0
    plugins = (*PLUGINS, "xdist.plugin") if parallel else PLUGINS
    command = [
        str(python),
        "-m",
        "pytest",
        "tests/gpu",
        "-W",
        "default",
        "--durations=10",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    command += [word for plugin in plugins for word in ("-p", plugin)]
    return [*command, "-n", str(WORKERS)] if parallel else command


def test_counts(log: str) -> dict[str, int]:
    """Counts of pytest's summary line, by outcome."""
    found = [re.findall(r"(\d+) (passed|failed|skipped|error)", line) for line in log.splitlines()]
    last = next((counts for counts in reversed(found) if counts), [])
    return {kind: int(count) for count, kind in last}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check", help="output folder")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-gpu")
    parser.add_argument("--only-install", action="store_true", help="only create the environment")
    parser.add_argument("--tests-seconds", type=float, default=270.0)
    parser.add_argument("--goals-seconds", type=float, default=360.0, help="after which no part of them starts")
    parser.add_argument("--goals", default="", metavar="ARGS", help="further options of bench.gpu.serving_check")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    if not args.only_install:
        _require_gpu()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = environment(args.environment, project["version"])
    if not install(python, args.wheels, requirements(project)):
        print(
            f"gpu-check: packages are missing (see above) and {args.wheels} has no wheels for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}; run `make gpu-wheels "
            f"GPU_PYTHON={sys.version_info.major}.{sys.version_info.minor}` on a machine with a network",
            file=sys.stderr,
        )
        raise SystemExit(PACKAGES)
    if args.only_install:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    tested = run(tests(python), args.out / "tests.log", args.tests_seconds)
    result = (args.out / "goals.json").resolve()
    result.unlink(missing_ok=True)
    measure = [str(python), "-m", "bench.gpu.serving_check", "--json", str(result)]
    measure += ["--seconds", str(args.goals_seconds), *args.goals.split()]
    measured = run(measure, args.out / "goals.log", args.goals_seconds + LATE)
    counts = test_counts((args.out / "tests.log").read_text())
    about = {"tests": counts | {"status": tested}, "measured": {"status": measured} | goals_of(result)}
    about["seconds"] = time.monotonic() - begin
    (args.out / "check.json").write_text(json.dumps(about) + "\n")
    print(json.dumps(about))
    if tested or measured or not counts.get("passed"):
        raise SystemExit(1)


def goals_of(result: Path) -> dict[str, Any]:
    """The goals, and parts that are missing, of what `serving_check` wrote; empty if it wrote nothing."""
    if not result.exists():
        return {}
    found = json.loads(result.read_text())
    return {key: found[key] for key in ("machine", "goals", "missing")}


def _require_gpu() -> None:
    """Exit with a message if there is no GPU."""
    found = subprocess.run([sys.executable, "-c", GPU_NAME], capture_output=True, text=True)
    if found.returncode:
        print(f"gpu-check: {found.stderr.strip()}, so there is nothing to check", file=sys.stderr)
        raise SystemExit(NO_GPU)
    print(f"gpu-check: {found.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()

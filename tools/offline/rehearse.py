"""Go through the whole of a packed training on this machine's processor: pack, unpack, train, break off, resume.

    python tools/offline/rehearse.py --data photos --python python3.12

Everything happens in an empty folder and a new environment that has torch, numpy and what --there names, nothing else.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or tar file of pictures; 60 are taken")
    parser.add_argument("--python", default=sys.executable, help="an interpreter of the target's version")
    parser.add_argument("--there", nargs="+", default=["torch", "numpy"], help="see pack.py")
    parser.add_argument("--environment", type=Path, help="one with these alone, instead of making one")
    parser.add_argument("--pack", type=Path, help="a pack to rehearse, instead of making a small one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rehearse(options, Path(folder))


def rehearse(options: argparse.Namespace, folder: Path) -> None:
    """Do it in `folder`; raises where a step does not end as it should."""
    python = bare_environment(options, folder)
    pack = (options.pack or small_pack(options, python, folder)).resolve()
    plant(python)

    def run(*arguments: str) -> subprocess.Popen[str]:
        # No variable of ours may help: neither a path to packages nor one to weights.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAC_", "PYTHON"))}
        command = [str(python), "-u", str(pack / "run.py"), *arguments, "--out", "results"]
        print("\n$", *command[2:], flush=True)
        return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.STDOUT)

    def complete(*arguments: str, code: int = 0) -> None:
        found = run(*arguments).wait()
        assert found == code, f"ended with {found}, not {code}"

    complete("check")
    # Interrupted, then out of time, then done.
    teacher = run("teacher", "--tiny", "--minutes", "5", "--iterations", "8")
    log = folder / "work" / "runs" / "teacher" / "log.jsonl"
    wait_for(lambda: log.exists() and '"train"' in log.read_text(), teacher)
    teacher.send_signal(signal.SIGINT)
    assert teacher.wait() == 130, "an interrupt must save and say so"
    complete("teacher", "--tiny", "--minutes", "0.2")
    complete("teacher", "--tiny", "--minutes", "5")
    # Planned by its speed.
    complete("velocity", "--tiny", "--minutes", "3")
    complete("rollout", "--tiny", "--minutes", "5", "--iterations", "3")
    complete(
        "generator", "--tiny", "--minutes", "5", "--iterations", "3", "--recipe", "sit-64", "--set", "field.classes=0"
    )
    for stage in ("teacher", "velocity", "rollout", "generator"):
        names = {file.name for file in (folder / "results" / stage).iterdir()}
        assert {"config.json", "log.jsonl", "recipe.json", "gallery.png"} < names, f"{stage} gave only {names}"
        assert any(name.endswith(".safetensors") for name in names), f"{stage} gave no weights"
    print("\nrehearsed: all stages ran from the pack alone, one was interrupted, ran out of time, and went on")


def bare_environment(options: argparse.Namespace, folder: Path) -> Path:
    """The interpreter of an environment with torch and numpy alone."""
    if options.environment:
        return options.environment.absolute() / "bin" / "python"
    environment = folder / "environment"
    subprocess.run([options.python, "-m", "venv", str(environment)], check=True)
    version = torch.__version__.partition("+")[0]
    packages = [f"torch=={version}" if name == "torch" else name for name in options.there]
    install = ["-m", "pip", "install", "--quiet", *packages]
    subprocess.run([str(environment / "bin" / "python"), *install], check=True)
    return environment / "bin" / "python"


def small_pack(options: argparse.Namespace, python: Path, folder: Path) -> Path:
    """A pack of a few pictures, for that interpreter."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    pack = folder / "pack"
    command = [sys.executable, str(HERE / "pack.py"), "--out", str(pack), "--data", str(options.data.resolve())]
    command += ["--coder", "klvae-f8d4"]
    subprocess.run([*command, "--pictures", "60", "--python", version, "--there", *options.there], check=True)
    return pack


def plant(python: Path) -> None:
    """Put a package into the environment that fails on import, as one of another version would."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    broken = Path(site) / "transformers"
    broken.mkdir(exist_ok=True)
    (broken / "__init__.py").write_text("raise ImportError('of a version that does not go with ours')\n")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; raises if the process ends first."""
    while not condition():
        assert process.poll() is None, f"ended early, with {process.returncode}"
        time.sleep(0.1)


if __name__ == "__main__":
    main()

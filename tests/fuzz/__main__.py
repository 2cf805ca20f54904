"""Fuzzing for as long as wanted: `./dev fuzz [TARGET…] [--seconds N]`; `./dev fuzz TARGET --replay FILE`.

What is learnt stays in .fuzz/TARGET/corpus, findings in .fuzz/TARGET/found, each with the command that repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Final

from tests.fuzz.seeds import CORPUS, TARGETS, invariant, target

ROOT: Final = Path(__file__).parents[2]
WORK: Final = ROOT / ".fuzz"
SECONDS: Final = 60
INPUT_SECONDS: Final = 10  # one input that takes longer is a finding
MEMORY_MB: Final = 2048
LONGEST: Final = 4096  # bytes of an input


def missing() -> str:
    """Why there is no engine; '' when there is one."""
    if importlib.util.find_spec("atheris") is not None:
        return ""
    system = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]} on {os.uname().machine}"
    return (
        f"atheris, the fuzzing engine, is not installed: there is no wheel of it for {system}\n"
        "     it exists for CPython 3.11 to 3.13 on x86_64 Linux; what is in tests/fuzz/corpus, and random inputs,\n"
        "     run without it: ./dev test tests/fuzz"
    )


def fuzz(name: str, seconds: int, work: Path = WORK) -> tuple[list[Path], str]:
    """Run a target for a while; what it found, and the engine's last words."""
    learnt, found = work / name / "corpus", work / name / "found"
    for folder in (learnt, found):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    limits = {
        "max_total_time": seconds,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "max_len": LONGEST,
        "print_final_stats": 1,
    }
    argv = [f"-{key}={value}" for key, value in limits.items()]
    argv += [f"-artifact_prefix={found}/", str(learnt), str(CORPUS / name)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.engine", name, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    words = done.stdout + done.stderr
    new = sorted(set(found.iterdir()) - before)
    if done.returncode and not new:
        raise RuntimeError(f"the engine failed on {name}:\n{words[-2000:]}")
    return new, words


def executed(words: str) -> int:
    """How many inputs the engine says that it ran."""
    last = [line for line in words.splitlines() if line.startswith("stat::number_of_executed_units")]
    return int(last[-1].split(":")[-1]) if last else 0


def replay(name: str, path: Path) -> int:
    """Run one input as it is, and show what it raises."""
    try:
        target(name)(path.read_bytes())
    except Exception:
        traceback.print_exc()
        return 1
    print(f"{name}: {path} is handled; what must hold:\n\n{invariant(name).strip()}")
    return 0


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="./dev fuzz", description="Fuzz the parsers of network bytes.")
    parser.add_argument(
        "target", nargs="*", choices=[*TARGETS, []], help=f"default: all; {', '.join(TARGETS)}"
    )
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target (default {SECONDS})")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input, without the engine")
    options = parser.parse_args(argv)
    if options.seconds < 1:
        parser.error("--seconds: at least 1")
    if options.replay is not None:
        if len(options.target) != 1:
            parser.error("--replay needs one target")
        if not options.replay.is_file():
            parser.error(f"there is no file {options.replay}")
        return replay(options.target[0], options.replay)
    if why := missing():
        print(f"dev: {why}", file=sys.stderr)
        return 1
    failed = 0
    for name in options.target or TARGETS:
        print(f">> {name}: {invariant(name).splitlines()[0]}", flush=True)
        found, words = fuzz(name, options.seconds)
        print(f"   {executed(words):,} inputs, {len(found)} findings", flush=True)
        for path in found:
            failed = 1
            print(f"   repeat: ./dev fuzz {name} --replay {path.relative_to(ROOT)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

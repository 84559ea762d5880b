"""The simulation's commands.

    python -m tests.simulation run --seeds 1000 [--from 1] [--jobs 2] [--seconds 60] [--plant NAME]
    python -m tests.simulation replay SEED
    python -m tests.simulation shrink SEED --kind A-orphan
    python -m tests.simulation hunt --kind A-orphan [--from 1] [--seconds 60]
    python -m tests.simulation plants [NAME …]

Common options: --never KIND,… --only KIND,… (faults and events), --memory, --shared, --without NAME;… (from a shrink).
Exit 1 if a promise was broken that the contract does not allow to break; 2 for wrong arguments.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    # Sets of texts have the same order in every process.
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])

from tests.simulation import plants, scenario
from tests.simulation.invariants import ALLOWED, KINDS, allowed
from tests.simulation.loop import real_seconds
from tests.simulation.scenario import EVENTS, FAULTS, Options, Result

CHECK_EVERY = 50
"""Each seed divisible by this runs twice: the same must happen."""
MOST_SEEDS = 2000
"""Seeds within which a planted bug must be found."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message}\n")


def say(line: str = "") -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")


# Arguments


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; takes a whole number")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; takes a whole number, at least 1")
    return int(text)


def _kinds(text: str) -> frozenset[str]:
    kinds = frozenset(filter(None, text.split(",")))
    known = {*FAULTS, *EVENTS}
    if unknown := sorted(kinds - known):
        raise argparse.ArgumentTypeError(f"no fault or event {unknown[0]!r}; takes {', '.join(sorted(known))}")
    return kinds


def _violation(text: str) -> str:
    known = [*KINDS, *(kind + end for kind in KINDS for end in ALLOWED)]
    if text not in known:
        raise argparse.ArgumentTypeError(f"no violation {text!r}; takes {', '.join(KINDS)}")
    return text


def _plant(text: str) -> str:
    if text not in plants.PLANTS:
        raise argparse.ArgumentTypeError(f"no planted bug {text!r}; takes {', '.join(plants.PLANTS)}")
    return text


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    common = _Parser(add_help=False)
    common.add_argument("--never", type=_kinds, default=frozenset(), metavar="KIND,…")
    common.add_argument("--only", type=_kinds, metavar="KIND,…")
    common.add_argument("--without", default="", metavar="NAME;…")
    common.add_argument("--plant", type=_plant, metavar="NAME")
    stores = common.add_mutually_exclusive_group()
    stores.add_argument("--memory", action="store_true", help="only memory://")
    stores.add_argument("--shared", action="store_true", help="only a shared store")
    top = _Parser(prog="python -m tests.simulation", description="The whole broker in virtual time.")
    commands = top.add_subparsers(required=True, dest="command")
    for name in ("run", "hunt", "replay", "shrink"):
        each = commands.add_parser(name, parents=[common])
        if name in ("run", "hunt"):
            each.add_argument("--from", dest="first", type=_seed, default=1)
        if name in ("replay", "shrink"):
            each.add_argument("seed", type=_seed)
        if name in ("hunt", "shrink"):
            each.add_argument("--kind", type=_violation, required=True)
        if name == "run":
            each.add_argument("--seeds", type=_count, default=1000)
            each.add_argument("--jobs", type=_count, default=2)
            each.add_argument("--examples", type=_count, default=3)
            each.add_argument("--seconds", type=float, help="stop after this long")
        if name == "hunt":
            each.add_argument("--seconds", type=float, default=60.0)
    each = commands.add_parser("plants")
    each.add_argument("names", nargs="*", type=_plant, metavar="NAME", help="default: all")
    each.add_argument("--jobs", type=_count, default=2)
    return top


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options of a run."""
    return Options(
        without=frozenset(filter(None, arguments.without.split(";"))),
        never=arguments.never,
        only=arguments.only,
        memory=True if arguments.memory else False if arguments.shared else None,
    )


# Many seeds


@dataclass(slots=True)
class Totals:
    """The sum of many runs. `examples`: by kind, seeds and what happened. `different`: seeds that did not replay."""

    runs: int = 0
    failed: int = 0
    virtual: float = 0
    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    different: list[int] = field(default_factory=list)

    def add(self, result: Result, same: bool) -> None:
        """Add a run."""
        self.runs += 1
        self.failed += any(not allowed(kind) for kind in result.kinds())
        self.virtual += result.seconds
        self.calls += result.calls
        self.counts.update(result.counts)
        if not same:
            self.different.append(result.seed)
        for kind in result.kinds():
            what = next(each.what for each in result.violations if each.kind == kind)
            self.examples[kind].append((result.seed, what))


def _one(job: tuple[int, Options, str | None]) -> tuple[Result, bool]:
    seed, options, plant = job
    with plants.planted(plant):
        result = scenario.run(seed, options)
        same = seed % CHECK_EVERY != 0 or scenario.run(seed, options).digest == result.digest
    return result, same


def _start() -> None:
    sys.unraisablehook = lambda _: None  # coroutines of killed replicas, when they are collected
    gc.collect()
    gc.freeze()


def results(
    seeds: Sequence[int], options: Options, *, plant: str | None = None, jobs: int = 2
) -> Generator[tuple[Result, bool]]:
    """Run seeds in several processes; yield each result, and whether it replayed, in the order of the seeds."""
    work = [(seed, options, plant) for seed in seeds]
    with multiprocessing.get_context("fork").Pool(jobs, _start) as pool:
        yield from pool.imap(_one, work, chunksize=8)


def run(arguments: argparse.Namespace) -> int:
    """Run many seeds, and print what happened in them."""
    totals, begun = Totals(), real_seconds()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    found = results(seeds, options_of(arguments), plant=arguments.plant, jobs=arguments.jobs)
    with contextlib.closing(found):
        for result, same in found:
            totals.add(result, same)
            if arguments.seconds and real_seconds() - begun > arguments.seconds:
                break
    took = real_seconds() - begun
    say(
        f"{totals.runs} runs in {took:.1f} s: {totals.runs / took * 60:.0f} seeds a minute, "
        f"{totals.virtual / took:.0f} virtual seconds a second, {totals.calls} calls"
    )
    say(f"Not the same when run twice: {', '.join(map(str, totals.different)) or 'none'}")
    say(f"{totals.failed} runs broke a promise")
    for kind, examples in sorted(totals.examples.items(), key=lambda each: (allowed(each[0]), -len(each[1]))):
        say(f"  {kind}: {len(examples)}{' (allowed)' if allowed(kind) else ''}")
        for seed, what in [] if allowed(kind) else sorted(examples)[: arguments.examples]:
            say(f"      seed {seed}: {what[:200]}")
    for title, prefix in (("Faults and events", "fault "), ("Records", "transition "), ("Answers", "answer ")):
        say(title + ":")
        chosen = {name: count for name, count in totals.counts.items() if name.startswith(prefix)}
        for name, count in sorted(chosen.items(), key=lambda each: -each[1]):
            say(f"  {name.removeprefix(prefix)}: {count}")
    return 1 if totals.failed or totals.different else 0


# One seed


def show(result: Result) -> None:
    """Print the history of a run."""
    for at, who, what in result.history:
        say(f"{at:9.3f}  {who:<12} {what}")
    say(f"digest {result.digest}, order {'shuffled' if result.shuffled else 'first in, first out'}")


def replay(arguments: argparse.Namespace) -> int:
    """Print the history of one seed."""
    with plants.planted(arguments.plant):
        result = scenario.run(arguments.seed, replace(options_of(arguments), keep_history=True))
    show(result)
    return any(not allowed(kind) for kind in result.kinds())


def shrink(arguments: argparse.Namespace) -> int:
    """Find the least history of a seed that still fails in one way, and print it."""
    options, tried = options_of(arguments), 0

    def failing(without: frozenset[str]) -> Result | None:
        nonlocal tried
        tried += 1
        result = scenario.run(arguments.seed, replace(options, without=without))
        return result if arguments.kind in result.kinds() else None

    with plants.planted(arguments.plant):
        without = options.without
        result = failing(without)
        if result is None:
            say(f"seed {arguments.seed} does not fail with {arguments.kind}")
            return 1
        if failing(without | {"shuffle"}):
            without |= {"shuffle"}
        progress = True
        while progress:
            names = [name for name in dict.fromkeys([*result.actors, *result.fired]) if name not in without]
            progress, size = False, max(1, len(names) // 2)
            while size:
                at = 0
                while at < len(names):
                    part = without | frozenset(names[at : at + size])
                    if (smaller := failing(part)) is not None:
                        result, without, progress = smaller, part, True
                        del names[at : at + size]
                    else:
                        at += size
                size //= 2
        show(scenario.run(arguments.seed, replace(options, without=without, keep_history=True)))
    say(f"{tried} runs; left: {', '.join(dict.fromkeys(result.fired)) or 'no fault'}")
    say(f"--without {';'.join(sorted(without))!r}")
    return 0


def hunt(arguments: argparse.Namespace) -> int:
    """Find the first seed that fails in one way, and shrink it."""
    _start()
    begun, seed = real_seconds(), arguments.first
    while real_seconds() - begun < arguments.seconds:
        with plants.planted(arguments.plant):
            found = arguments.kind in scenario.run(seed, options_of(arguments)).kinds()
        if found:
            say(f"seed {seed} (after {seed - arguments.first + 1})")
            arguments.seed = seed
            return shrink(arguments)
        seed += 1
    say(f"none of {seed - arguments.first} seeds")
    return 1


def plant_all(arguments: argparse.Namespace) -> int:
    """Plant each bug, and print how many seeds it takes to find it."""
    missed = 0
    say(f"{'plant':<32} {'invariant':<18} seeds")
    for name in arguments.names or plants.PLANTS:
        plant = plants.PLANTS[name]
        needed = first_found(name, jobs=arguments.jobs)
        missed += needed is None
        say(f"{name:<32} {plant.kind:<18} {needed if needed is not None else f'not within {MOST_SEEDS}'}")
    return 1 if missed else 0


def first_found(name: str, *, most: int = MOST_SEEDS, jobs: int = 2) -> int | None:
    """Return how many seeds it takes until a planted bug breaks its promise; None if it is not found."""
    plant = plants.PLANTS[name]
    found = results(range(1, most + 1), plant.options, plant=name, jobs=jobs)
    with contextlib.closing(found):
        for count, (result, _) in enumerate(found, 1):
            # Only what the bug itself breaks: the app may break the same promise without it.
            if plant.kind in result.kinds() and plant.kind not in scenario.run(result.seed, plant.options).kinds():
                return count
    return None


COMMANDS = {"run": run, "hunt": hunt, "replay": replay, "shrink": shrink, "plants": plant_all}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parsed = parser().parse_args(arguments)
    sys.unraisablehook = lambda _: None
    return COMMANDS[parsed.command](parsed)


if __name__ == "__main__":
    sys.exit(main())

"""The campaign's storage faults: full disks, read-only disks, and damage to published files."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.store import artifact
from lab.faults.faults import Outcome, left_of, new_spot, next_make, told, trap_of, variants
from lab.faults.laboratory import TINY, Journey, Lab, Run, leftovers, unsound

DISK_BYTES, DISK_INODES = 48 << 20, 600
# Audit events of the changes that need space on the disk. A full disk can refuse only these.
TAKES_ROOM = ("open", "os.mkdir", "os.rename")
DAMAGES = ("deleted", "emptied", "halved", "without its last byte", "first bit", "last bit", "one bit")
FLIPS = 50  # single bits flipped in each manifest to see whether reading notices it; undone before the damage itself


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system in memory (tmpfs) at `folder`. Raises UserError if this process may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is not installed; this fault needs Linux's mount") from None
    if done.returncode:
        raise UserError("mounting a small file system needs root; run the campaign as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _refused(run: Run, *fragments: str) -> list[str]:
    """Return what is wrong with the run's error: it must be status 2 and one line that holds one of `fragments`."""
    lines = [line for line in run.said().splitlines() if line.startswith("error: ")]
    fine = run.status == 2 and len(lines) == 1 and any(fragment in lines[0] for fragment in fragments)
    if fine and "Traceback" not in run.said():
        return []
    return [f"status {run.status} instead of one line and status 2: {run.said()[-1500:]}"]


def full_disk(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """The disk (a file system in memory) has no free block, or no free inode, from one change on."""
    # `index` goes through the changes that need space, so that each of them has its turn.
    turns = (
        (journey, number)
        for journey in (Journey(TINY[0].name, None, "first"), Journey(TINY[0].name, "first", "opset"))
        for number, change in enumerate(lab.timeline(journey).changes)
        if change.event in TAKES_ROOM
    )
    journey, number = next(itertools.islice(itertools.cycle(turns), index, None))
    change = lab.timeline(journey).changes[number]
    fill = rng.choices(["bytes", "inodes"], [7, 3])[0]
    slack = int(rng.choice([0, rng.uniform(0, 5e3), rng.uniform(0, 1e6)])) if fill == "bytes" else rng.choice([0, 1, 3])
    options = f"size={DISK_BYTES},nr_inodes={DISK_INODES}"
    with (
        new_spot(lab, name, Journey(journey.model, None, journey.goal)) as spot,
        mounted(spot / "out", options) as disk,
    ):
        if journey.start is not None:
            shutil.copytree(lab.finished(journey.model, journey.start), disk, dirs_exist_ok=True)
        trap = trap_of(spot, at=number, fill=fill, disk=str(disk), slack=slack)
        run = Run(lab, spot, lab.make(spot, journey.model, journey.goal), trap)
        run.wait()
        wrong = [] if run.status == 0 else _refused(run, "free some space")
        wrong += left_of([run]) + [f"{item} is left" for item in leftovers(spot)]
        wrong += unsound(lab, spot, journey.model, variants(journey))
        struck = (disk / "filler").exists() or (disk / "inodes").exists()
        (disk / "filler").unlink(missing_ok=True)
        shutil.rmtree(disk / "inodes", ignore_errors=True)
        wrong += next_make(lab, spot, journey)
    what = f"only {slack} {fill} left from change {number} on ({change.event} {change.path}), {told(journey)}"
    return Outcome(what, struck, tuple(wrong))


def size_limit(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """No file may grow beyond a limit (RLIMIT_FSIZE, as `ulimit -f`): a larger write fails with EFBIG."""
    journey = Journey(TINY[0].name, *rng.choice([(None, "first"), ("first", "opset")]))
    model = lab.finished(journey.model, journey.goal) / "artifacts" / journey.model / "fp32" / artifact.MODEL
    # The run's own output goes into a file too, so the limit must leave room for it.
    limit = max(4096, int(model.stat().st_size * rng.random() ** 3))
    with new_spot(lab, name, journey) as spot:
        run = Run(
            lab,
            spot,
            lab.make(spot, journey.model, journey.goal),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        run.wait()
        wrong = [] if run.status == 0 else _refused(run, "file too large")
        wrong += left_of([run]) + [f"{item} is left" for item in leftovers(spot)]
        wrong += unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    return Outcome(f"no file beyond {limit} bytes, {told(journey)}", run.status != 0, tuple(wrong))


def read_only(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """The outputs cannot be written: their file system is mounted read-only, or their folders have mode 0555."""
    start, goal = [(None, "first"), ("first", "first"), ("first", "opset"), ("first", "corpus")][index // 3 % 4]
    journey = Journey(TINY[0].name, start, goal)
    how = ("mounted read-only", "reports alone read-only", "mode 0555")[index % 3]
    with new_spot(lab, name, Journey(journey.model, None, goal)) as spot:
        out = spot / "out"
        closed = out / "reports" if index % 3 == 1 else out
        with mounted(closed, f"size={DISK_BYTES}"):
            if start is not None:
                shutil.copytree(lab.finished(journey.model, start), out, dirs_exist_ok=True)
            before = files_below(closed)
            command = lab.make(spot, journey.model, goal)
            if index % 3 == 2:
                folders = [closed, *(path for path in closed.rglob("*") if path.is_dir())]
                _set_mode(folders, 0o555)
                # Root may write to any folder, whatever its mode. Dropping this capability takes that right away.
                command = [*(["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []), *command]
                run = Run(lab, spot, command)
                run.wait()
                _set_mode(folders, 0o755)
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(closed)], check=True)
                run = Run(lab, spot, command)
                run.wait()
            ended = left_of([run])
            if index % 3 != 2:
                subprocess.run(["mount", "-o", "remount,rw", str(closed)], check=True)
            wrong = ended
            # If everything is up to date, a run writes nothing, so it succeeds as long as it can open the lock file.
            if start != goal or run.status != 0:
                wrong += _refused(run, "read-only", "permission denied")
            if files_below(closed) != before:
                wrong.append("read-only files have changed")
            wrong += [f"{item} is left" for item in leftovers(spot)]
            wrong += unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    return Outcome(f"{how}, {told(journey)}", True, tuple(wrong))


def damage(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """One file of every published artifact and one of the report are deleted, cut, or have one bit flipped."""
    journey = Journey(TINY[0].name, "first", "first")
    how, wrong, files = DAMAGES[index % len(DAMAGES)], [], []
    with new_spot(lab, name, journey) as spot:
        for number, folder in enumerate(sorted((spot / "out" / "artifacts" / journey.model).glob("[!.]*"))):
            names = sorted(path.name for path in folder.iterdir())
            file = folder / names[(index // len(DAMAGES) + number) % len(names)]
            if file.name == artifact.MANIFEST:
                wrong += _unnoticed_flips(file, rng)
            spoil(file, how, rng)
            files.append(f"{folder.name}/{file.name}")
            if _opens(folder):
                wrong.append(f"{file} is damaged ({how}), but its artifact still opens")
        pages = sorted((spot / "out" / "reports" / journey.model).glob("report.*"))
        page = pages[index // len(DAMAGES) % len(pages)]
        spoil(page, how, rng)
        files.append(page.name)
        spoilt = page.read_bytes() if page.exists() else None
        wrong += next_make(lab, spot, journey)
        if page.exists() and page.read_bytes() == spoilt:
            wrong.append(f"{page.name} is damaged ({how}), and the next make does not replace it")
    return Outcome(f"{', '.join(files)}: {how}", True, tuple(wrong))


def spoil(file: Path, how: str, rng: random.Random) -> None:
    """Damage `file` in the way `how`, one of DAMAGES."""
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how.endswith("bit"):
        bit = {"first bit": 0, "last bit": 8 * len(data) - 1}.get(how, rng.randrange(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    else:
        file.write_bytes(data[: {"emptied": 0, "halved": len(data) // 2}.get(how, len(data) - 1)])


def _unnoticed_flips(manifest: Path, rng: random.Random) -> list[str]:
    """Flip single bits of `manifest` and describe each flip with which the artifact still opens. Restores the file."""
    whole, wrong = manifest.read_bytes(), []
    for bit in sorted(rng.sample(range(8 * len(whole)), FLIPS)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        if _opens(manifest.parent):
            around = bytes(data[max(0, bit // 8 - 20) : bit // 8 + 20])
            wrong.append(f"{manifest.parent.name}/manifest.json: bit {bit} flipped is not noticed ({around!r})")
    manifest.write_bytes(whole)
    return wrong


def _opens(folder: Path) -> bool:
    try:
        artifact.open_artifact(folder)
    except UserError:
        return False
    return True


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _set_mode(folders: Sequence[Path], mode: int) -> None:
    for folder in folders:
        folder.chmod(mode)

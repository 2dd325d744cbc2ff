"""Every recorded answer is of a real cluster, one line per step, "theme episode" before each program (in `recorded/`).

python tests/conformance/recording.py /path/to/ceph.conf     # writes them anew (Ceph 16.2.15 was used)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import class_programs
import op_programs

from librbd_py.store import api, rados

FOLDER = Path(__file__).parent / "recorded"
CLASSES = FOLDER / "classes.txt"
OPS = FOLDER / "operations.txt"


def class_answers(contexts: Sequence[api.ObjectContext], theme: str, episode: int) -> Iterator[tuple[str, str]]:
    """(what was done, answer) for each step."""
    for number, step in enumerate(class_programs.steps(theme, episode)):
        yield f"{number}: {step.label}", " ".join(part for part in class_programs.outcome(contexts, step) if part)


def op_answers(io: api.ObjectContext, episode: int) -> Iterator[tuple[str, str]]:
    player = op_programs.Player(io)
    for number, step in enumerate(op_programs.steps(episode)):
        yield f"{number}: {step}", player.run(step)


def load(path: Path) -> dict[tuple[str, int], list[str]]:
    """(theme, episode) -> answers."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            theme, episode = line[2:].split()
            answers = found[theme, int(episode)] = []
        else:
            answers.append(line)
    return found


def main(conf: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    stores = [rados.connect(rados.ClusterOptions(conf), share=False) for _ in range(2)]
    pool = "recording"
    stores[0].pool_create(pool)
    contexts = [store.open(pool, "classes") for store in stores]
    with CLASSES.open("w") as out:
        for theme, count in class_programs.EPISODES.items():
            for episode in range(count):
                print(f"# {theme} {episode}", file=out)
                for _, answer in class_answers(contexts, theme, episode):
                    print(answer, file=out)
    with OPS.open("w") as out:
        for episode in range(op_programs.EPISODES):
            print(f"# operations {episode}", file=out)
            for _, answer in op_answers(stores[0].open(pool, f"operations-{episode}"), episode):
                print(answer, file=out)
    stores[0].pool_remove(pool)
    for store in stores:
        store.close()


if __name__ == "__main__":
    main(sys.argv[1])

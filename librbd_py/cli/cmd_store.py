"""`rbdpy store check`: verifies an embedded store that nobody uses, or the images of a cluster, and explains each
finding."""

from __future__ import annotations

import argparse

from librbd_py.cli.output import Rows, Section
from librbd_py.cli.registry import command, with_format
from librbd_py.cli.session import Failure, Session, code_of
from librbd_py.store import default_url, is_ceph


def with_repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="mend what can be mended without losing data")
    parser.add_argument(
        "--snapshots",
        action="store_true",
        help="on Ceph, look whether data objects keep anything for snapshots that are no more",
    )


@command("store check", "Verify a store and explain each finding: an embedded one offline.", with_repair, with_format)
def check(session: Session) -> None:
    from librbd_py.store.check import pools
    from librbd_py.store.embedded import check as checker

    url = session.options.store or default_url()
    repair = session.options.repair
    try:
        if is_ceph(url) or url.startswith("memory:"):
            findings = pools.check(session.light_store(), repair=repair, snapshots=session.options.snapshots)
        else:
            findings = checker.check(url.removeprefix("embedded:"), repair=repair)
    except OSError as error:
        raise Failure(f"rbd: store check: {error.strerror or error}", code_of(error)) from None
    rows = Rows(
        "findings",
        [
            Section("finding", {"severity": f.severity, "where": f.where, "what": f.what, "advice": f.advice})
            for f in findings
        ],
    )
    if not session.plain:
        session.show(rows)
    for row in rows if session.plain else ():
        print(f"{row['severity']}: {row['where']}: {row['what']}\n\t{row['advice']}")
    if session.plain and not rows:
        print("no findings")
    if any(row["severity"] == "error" for row in rows):
        raise Failure("", 1)

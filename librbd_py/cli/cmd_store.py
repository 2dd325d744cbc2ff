"""`rbdpy store check`: verifies an embedded store that nobody uses, or the images of a cluster, and explains each
finding. `rbdpy store unblock`: ends the process that stands still with an embedded store's lock."""

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


def with_unblock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="kill it even if it is not stopped")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")


@command("store unblock", "Kill the stopped process that keeps an embedded store locked.", with_unblock)
def unblock(session: Session) -> None:
    from librbd_py.store.embedded import unblock as blocked

    options = session.options
    url = options.store or default_url()
    if is_ceph(url) or url.startswith("memory:"):
        raise Failure("rbd: store unblock: only an embedded store has such a lock", 22)
    try:
        blocked.unblock(
            url.removeprefix("embedded:"),
            lambda step: print(step, flush=True),
            force=options.force,
            dry_run=options.dry_run,
        )
    except OSError as error:
        raise Failure(f"rbd: store unblock: {error.strerror or error}", code_of(error)) from None

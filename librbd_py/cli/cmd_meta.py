"""Commands on what belongs to an image: image-meta and feature."""

from __future__ import annotations

import sys

from librbd_py.cli.arguments import FORMAT, IMAGE, JOURNAL
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures
from librbd_py.cli.sizes import feature_bits

KEY = "key:image meta key"
_FEATURES = "features:image features\n[exclusive-lock, object-map, journaling]..."


def needed(session: Session, name: str) -> str:
    """The next word. Failure (22)."""
    word = session.word()
    if not word:
        raise Failure(f"rbd: {name} was not specified", 22)
    return word


@verb(
    "image-meta list",
    "Image metadata list keys with values.",
    *IMAGE,
    *FORMAT,
    spec=("image-spec",),
    alias="image-meta ls",
)
def meta_list(session: Session) -> None:
    spec = session.spec()
    session.layout()
    with session.image(spec, read_only=True) as image, failing("listing metadata failed"):
        found = dict(sorted(image.metadata_list()))
    if not session.plain:
        session.show(Section("metadatas", found))
        return
    if not found:
        print("There are 0 metadata on this image.")
        return
    many = len(found) > 1
    print(f"There {'are' if many else 'is'} {len(found)} metadat{'a' if many else 'um'} on this image:\n")
    table = Table(("Key", "left"), ("Value", "left"))
    for key, value in found.items():
        table.add(key, value)
    sys.stdout.write(table.text())


@verb(
    "image-meta get",
    "Image metadata get the value associated with the key.",
    *IMAGE,
    spec=("image-spec", KEY),
)
def meta_get(session: Session) -> None:
    spec, key = session.spec(), needed(session, "metadata key")
    with session.image(spec, read_only=True) as image:
        try:
            print(image.metadata_get(key))
        except (KeyError, failures()[0], OSError) as error:
            code = 2 if isinstance(error, KeyError) else code_of(error)
            raise Failure(
                f"failed to get metadata {key} of image : {reason(code)}\nrbd: getting metadata failed: {reason(code)}",
                code,
            ) from None


@verb(
    "image-meta set",
    "Image metadata set key with value.",
    *IMAGE,
    spec=("image-spec", KEY, "value:image meta value"),
)
def meta_set(session: Session) -> None:
    spec, key = session.spec(), needed(session, "metadata key")
    value = needed(session, "metadata value")
    with session.image(spec) as image:
        try:
            image.metadata_set(key, value)
        except failures() as error:
            why = reason(error)
            text = f"failed to set metadata {key} of image : {why}\nrbd: setting metadata failed: {why}"
            raise Failure(text, code_of(error)) from None


@verb(
    "image-meta remove",
    "Image metadata remove the key and value associated.",
    *IMAGE,
    spec=("image-spec", KEY),
    alias="image-meta rm",
)
def meta_remove(session: Session) -> None:
    spec, key = session.spec(), needed(session, "metadata key")
    with session.image(spec) as image:
        try:
            image.metadata_remove(key)
        except (KeyError, failures()[0], OSError) as error:
            code = 2 if isinstance(error, KeyError) else code_of(error)
            what = "rbd: no existing metadata key" if code == 2 else "failed to remove metadata"
            raise Failure(
                f"{what} {key} of image : {reason(code)}\nrbd: removing metadata failed: {reason(code)}", code
            ) from None


@verb(
    "feature enable",
    "Enable the specified image feature.",
    *IMAGE,
    *JOURNAL,
    spec=("image-spec", _FEATURES),
)
def feature_enable(session: Session) -> None:
    _feature(session, True)


@verb("feature disable", "Disable the specified image feature.", *IMAGE, spec=("image-spec", _FEATURES))
def feature_disable(session: Session) -> None:
    _feature(session, False)


def _feature(session: Session, enabled: bool) -> None:
    spec = session.spec()
    bits, words = 0, session.words[session.at :]
    if not words:
        raise Failure("rbd: at least one feature name must be specified", 22)
    try:
        for word in words:
            bits |= feature_bits(word)
    except ValueError:
        raise Failure("rbd: the argument for option is invalid") from None
    with session.image(spec) as image, failing("failed to update image features"):
        image.update_features(bits, enabled)

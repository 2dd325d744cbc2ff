"""Domain XML as it comes from a hook's stdin, a file or another host: hostile until parsed here.

A DOM, because what is not ours must come out as it went in: comments, prefixes, order and white space of attributes.
Entity tricks need a DOCTYPE, and libvirt never writes one, so a DOCTYPE is refused before it is read.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from xml.dom.expatbuilder import ExpatBuilderNS
from xml.dom.minidom import Document, Element, Text
from xml.parsers.expat import ExpatError, XMLParserType

SIZE_MAX = 4 << 20  # bytes; a domain with a hundred disks has 100 KiB
DEPTH_MAX = 64  # elements in each other; libvirt's own schema needs 12


class DomainXMLError(OSError):
    """EINVAL: not a domain as libvirt writes it. The text says what and where."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EINVAL, f"domain XML: {why}")


class _Builder(ExpatBuilderNS):
    def install(self, parser: XMLParserType) -> None:
        super().install(parser)
        parser.StartDoctypeDeclHandler = self._refuse
        parser.EntityDeclHandler = self._refuse
        self._depth = 0

    def _refuse(self, *_: object) -> None:
        raise DomainXMLError("a DOCTYPE is not accepted")

    def start_element_handler(self, name: str, attributes: list[str]) -> None:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise DomainXMLError(f"elements are nested deeper than {DEPTH_MAX}")
        super().start_element_handler(name, attributes)

    def end_element_handler(self, name: str) -> None:
        self._depth -= 1
        super().end_element_handler(name)


def parse(text: str | bytes) -> Document:
    """A document whose root is <domain>. DomainXMLError."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > SIZE_MAX:
        raise DomainXMLError(f"{len(data)} bytes are more than {SIZE_MAX}")
    try:
        document: Document = _Builder().parseString(data)
    except ExpatError as error:
        raise DomainXMLError(str(error)) from None
    except (ValueError, LookupError) as error:  # an encoding nobody knows
        raise DomainXMLError(str(error)) from None
    root = document.documentElement
    if root is None or root.tagName != "domain":
        raise DomainXMLError(f"the root is <{root.tagName if root else ''}>, not <domain>")
    return document


def serialize(document: Document) -> str:
    """Without the XML declaration, as libvirt prints domains."""
    root = document.documentElement
    assert root is not None
    return str(root.toxml()) + "\n"


def children(parent: Element, name: str | None = None) -> Iterator[Element]:
    """Child elements, in order; those of one tag name."""
    for node in list(parent.childNodes):
        if isinstance(node, Element) and (name is None or node.tagName == name):
            yield node


def child(parent: Element, *path: str) -> Element | None:
    """The first element at the path below `parent`."""
    here: Element | None = parent
    for name in path:
        here = next(children(here, name), None) if here is not None else None
    return here


def text_of(element: Element | None) -> str:
    if element is None:
        return ""
    return "".join(
        node.data for node in element.childNodes if node.nodeType in (node.TEXT_NODE, node.CDATA_SECTION_NODE)
    )


def add(parent: Element, tag: str, /, **attributes: str) -> Element:
    """A new last child of `parent`."""
    document = parent.ownerDocument
    assert document is not None
    made = document.createElement(tag)
    for key, value in attributes.items():
        made.setAttribute(key, value)
    parent.appendChild(made)
    return made


def copied(element: Element) -> Element:
    """With all below it."""
    copy = element.cloneNode(True)
    assert isinstance(copy, Element)
    return copy


def replace(old: Element, new: Element) -> None:
    parent = old.parentNode
    assert isinstance(parent, Element)
    parent.replaceChild(new, old)


def remove(element: Element) -> None:
    """With the white space before it, so that no empty line stays."""
    parent, before = element.parentNode, element.previousSibling
    assert isinstance(parent, Element)
    if isinstance(before, Text) and not before.data.strip():
        parent.removeChild(before)
    parent.removeChild(element)

"""What every command works with: options, the connection, pools, images."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Progress, Rows, Section, structured

if TYPE_CHECKING:
    from librbd_py import rados
    from librbd_py.store.api import ObjectContext, Store

__all__ = ["Failure", "Session", "Spec", "code_of", "failing", "failures", "parse_spec", "reason"]

DEFAULT_POOL = "rbd"

# How strictly names are checked: what makes one is strict, what only looks one up is not.
_LOOSE = r"(?:([^/]+)/(?:([^/@]+)/)?)?([^@]+)(?:@(.+))?"
_SNAP = r"(?:([^/]+)/(?:([^/@]+)/)?)?([^@]+)(?:@([^/@]+))?"
_FULL = r"(?:([^/@]+)/(?:([^/@]+)/)?)?([^/@]+)(?:@([^/@]+))?"
_CHECKS = {"loose": _LOOSE, "snap": _SNAP, "full": _FULL}


class Spec(NamedTuple):
    """[pool/[namespace/]]image[@snap] with what the options added. Empty string = not given."""

    pool: str
    namespace: str
    image: str
    snap: str = ""

    def text(self) -> str:
        where = self.pool + "/" + (self.namespace + "/" if self.namespace else "")
        return where + self.image + ("@" + self.snap if self.snap else "")


def parse_spec(text: str, check: str = "loose") -> Spec:
    """Failure (22) for a malformed one."""
    match = re.fullmatch(_CHECKS[check], text, re.DOTALL)
    if not match:
        raise Failure(f"rbd: invalid spec '{text}'", 22)
    return Spec(match[1] or "", match[2] or "", match[3], match[4] or "")


def failures() -> tuple[type[BaseException], ...]:
    """The classes of what the library raises."""
    from librbd_py import errors

    return (errors.rbd.Error, errors.rados.Error, OSError)


def _no_cluster(error: BaseException) -> Failure:
    return Failure(f"rbd: couldn't connect to the cluster!\n{error}", code_of(error))


class Session:
    """One run of the command. The connection is made at first use and closed at the end."""

    options: Any = None  # of argparse, for the commands that rbd does not have

    def __init__(
        self,
        store: str | None,
        given: dict[str, Any] | None = None,
        words: list[str] | None = None,
        overrides: dict[str, str] | None = None,
    ) -> None:
        self.store = store
        self.given = given or {}
        self.words = words or []
        self.overrides = overrides or {}
        self.at = 0  # the positional argument that comes next
        self._cluster: rados.Rados | None = None
        self._light: Store | None = None

    @property
    def cluster(self) -> rados.Rados:
        if self._cluster is None:
            from librbd_py import rados

            conf = {"rbdpy_store": self.store} if self.store else {}
            try:
                self._cluster = rados.Rados(conf=conf | self.overrides or None)
                self._cluster.connect()
            except failures() as error:
                self._cluster = None
                raise _no_cluster(error) from None
        return self._cluster

    def take(self, options: Any) -> None:
        """The options of a command that argparse read: what they share with `rbd`'s means the same."""
        self.options = options
        options.store = self.store
        self.words = list(options.specs)
        values = {name.replace("_", "-"): value for name, value in vars(options).items() if name != "specs"}
        self.given = {name: value for name, value in values.items() if value not in (None, False)}

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None
        if self._light is not None:
            self._light.close()
            self._light = None

    # --- what the words mean

    def option(self, name: str) -> Any:
        """None (False for a switch that matters only when set) when it was not given."""
        return self.given.get(name)

    def word(self) -> str:
        """The next positional argument; empty: there is none."""
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else ""

    def spec(
        self,
        *,
        dest: bool = False,
        need: bool = True,
        snap: str = "no",
        check: str = "loose",
        kind: str = "image",
        pool_option: str = "",
        namespace_option: str = "",
    ) -> Spec:
        """The image (or group, by `kind`) of the options, else of the next word. `snap`: "no", "may", "must".
        `check`: "full" for names that will be made, "snap" when the snapshot will be. Failure (22)."""
        prefix = "dest-" if dest else ""
        name_option = ("dest" if dest else "image") if kind == "image" else prefix + kind
        found = Spec(
            self.given.get(pool_option or prefix + "pool", ""),
            self.given.get(namespace_option or prefix + "namespace", ""),
            self.given.get(name_option, ""),
            self.given.get(prefix + "snap", ""),
        )
        if found.image and kind == "image":
            found = self._merged(found, found.image, check)
        elif not found.image:
            word = self.word()
            if word:
                found = self._merged(found, word, check)
        which = "destination " if dest else ""
        if need and not found.image:
            raise Failure(f"rbd: {which}{kind} name was not specified", 22)
        if check == "full" and re.search("[@/]", found.pool):
            raise Failure(f"rbd: invalid pool name '{found.pool}'", 22)
        if re.search("[@/]", found.namespace):
            raise Failure(f"rbd: invalid namespace name '{found.namespace}'", 22)
        if snap == "must" and not found.snap:
            raise Failure(f"rbd: {which}snapshot name was not specified", 22)
        if snap == "no" and found.snap:
            raise Failure(f"rbd: {which}snapshot name specified for a command that doesn't use it", 22)
        if check == "snap" and re.search("[@/]", found.snap):
            raise Failure(f"rbd: invalid snap name '{found.snap}'", 22)
        if self.options is not None:
            return found._replace(pool=self.pool_name(found))  # these show where they were
        return found

    def _merged(self, found: Spec, text: str, check: str) -> Spec:
        parsed = parse_spec(text, check)
        return Spec(
            parsed.pool or found.pool, parsed.namespace or found.namespace, parsed.image, parsed.snap or found.snap
        )

    def pool_spec(self, *, namespaces: bool = True, check: bool = False) -> Spec:
        """Pool and namespace of the options, else of the next word."""
        pool, namespace = self.given.get("pool", ""), self.given.get("namespace", "") if namespaces else ""
        if not pool:
            word = self.word()
            if namespaces and "/" in word:
                pool, _, namespace = word.rpartition("/")
            else:
                pool = word
        if check and re.search("[@/]", pool):
            raise Failure(f"rbd: invalid pool '{pool}'", 22)
        if namespaces and re.search("[@/]", namespace):
            raise Failure(f"rbd: invalid namespace '{namespace}'", 22)
        return Spec(pool, namespace, "")

    def image_id_spec(self) -> Spec:
        """[pool/[namespace/]]image-id, as `trash` takes it."""
        found = Spec(self.given.get("pool", ""), self.given.get("namespace", ""), self.given.get("image-id", ""))
        if not found.image:
            word = self.word()
            if word:
                found = self._merged(found, word, "full")
        if not found.image:
            raise Failure("rbd: image id was not specified", 22)
        if found.snap:
            raise Failure("rbd: snapshot name specified for a command that doesn't use it", 22)
        return found

    def path(self) -> str:
        """--path, else the next word. Failure (22)."""
        path = str(self.given.get("path") or self.word())
        if not path:
            raise Failure("rbd: path was not specified", 22)
        return path

    # --- what they lead to

    def pool_name(self, spec: Spec) -> str:
        return spec.pool or self.overrides.get("rbd_default_pool", "") or DEFAULT_POOL

    def ioctx(self, spec: Spec, *, namespace: bool = True) -> rados.Ioctx:
        """Failure: no such pool or namespace."""
        pool = self.pool_name(spec)
        try:
            ioctx = self.cluster.open_ioctx(pool)
        except failures() as error:
            raise self._no_pool(pool, error) from None
        if spec.namespace and namespace:
            self._require_namespace(ioctx.context, spec.namespace)
            ioctx.set_namespace(spec.namespace)
        return ioctx

    def _no_pool(self, pool: str, error: BaseException) -> Failure:
        if code_of(error) == 2 and pool == (self.overrides.get("rbd_default_pool") or DEFAULT_POOL):
            return Failure(
                f"rbd: error opening default pool '{pool}'\n"
                "Ensure that the default pool has been created or specify an alternate pool name.",
                2,
            )
        return Failure(f"rbd: error opening pool '{pool}': {reason(error)}", code_of(error))

    def _require_namespace(self, ctx: ObjectContext, namespace: str) -> None:
        from librbd_py.image import cls

        try:
            if namespace in cls.list_namespaces(ctx):
                return
        except PermissionError:
            return  # a user confined to a namespace may not ask which there are
        except OSError as error:
            raise Failure(f"rbd: error asserting namespace: {reason(error)}", code_of(error)) from None
        raise Failure(f"rbd: namespace '{namespace}' does not exist.", 2)

    def context(self, spec: Spec) -> ObjectContext:
        """What `ioctx` is made of, without loading what programs see of a cluster: for commands that only list."""
        pool = self.pool_name(spec)
        cluster = self.light_store()
        try:
            ctx = cluster.open(pool)
        except OSError as error:
            raise self._no_pool(pool, error) from None
        if not spec.namespace:
            return ctx
        self._require_namespace(ctx, spec.namespace)
        return cluster.open(pool, spec.namespace)

    def light_store(self) -> Store:
        from librbd_py import store as stores

        try:
            if self._light is None:
                self._light = stores.connect(self._url())
        except OSError as error:
            raise _no_cluster(error) from None
        return self._light

    def _url(self) -> str | None:
        from librbd_py import store as stores

        url = self.store or stores.default_url()
        if not self.overrides or not stores.is_ceph(url):
            return self.store
        from urllib.parse import quote

        said = "&".join(f"{name}={quote(value, safe='/:,')}" for name, value in self.overrides.items())
        return url + ("&" if "?" in url else "?") + said

    @contextmanager
    def image(self, spec: Spec, *, read_only: bool = False, snap: bool = False, image_id: str = "") -> Iterator[Any]:
        """An open image, at its snapshot when `snap`. A failure to open ends the command as `rbd` says it."""
        from librbd_py import rbd

        ioctx = self.ioctx(spec)
        try:
            if image_id:
                image = rbd.Image(ioctx, image_id=image_id, read_only=read_only)
            else:
                image = rbd.Image(ioctx, spec.image, read_only=read_only)
        except rbd.Error as error:
            what = f"image with id {image_id}" if image_id else f"image {spec.image}"
            raise Failure(f"rbd: error opening {what}: {reason(error)}", code_of(error)) from None
        try:
            if snap and spec.snap:
                try:
                    image.set_snap(spec.snap)
                except rbd.Error as error:
                    raise Failure(f"error setting snapshot context: {reason(error)}", code_of(error)) from None
            yield image
        finally:
            try:
                image.close()
            except rbd.Error as error:
                raise Failure(f"rbd: error closing image {spec.image}: {reason(error)}", code_of(error)) from None

    def by_name_or_id(self, spec: Spec, blank: str = " ") -> str:
        """--image-id; Failure (22) when a name was given too."""
        image_id = str(self.given.get("image-id", ""))
        if image_id and spec.image:
            raise Failure(f"rbd: trying to access image using both name and id.{blank}", 22)
        return image_id

    # --- output

    def progress(self, verb: str) -> Progress:
        return Progress(verb, not self._option("no_progress"))

    def _option(self, name: str) -> Any:
        """Of either kind of command."""
        return self.given.get(name.replace("_", "-"))

    def layout(self) -> str:
        """ "plain", "json" or "xml". Failure (22): pretty and plain."""
        chosen = str(self.given.get("format", "plain"))
        if chosen == "plain" and self.given.get("pretty-format"):
            raise Failure("rbd: --pretty-format only works when --format is json or xml", 22)
        return chosen

    @property
    def plain(self) -> bool:
        return str(self._option("format") or "plain") == "plain"

    def show(self, value: Section | Rows) -> None:
        sys.stdout.write(structured(value, str(self._option("format")), bool(self._option("pretty_format"))))

    def say(self, text: str) -> None:
        """A line on standard error."""
        print(text, file=sys.stderr, flush=True)


@contextmanager
def failing(what: str, prefix: str = "rbd: ") -> Iterator[None]:
    """Turns an error of the library into `rbd: <what>: (errno) text` with that exit status."""
    try:
        yield
    except failures() as error:
        if os.environ.get("RBDPY_TRACEBACK"):
            raise
        raise Failure(f"{prefix}{what}: {reason(error)}", code_of(error)) from None

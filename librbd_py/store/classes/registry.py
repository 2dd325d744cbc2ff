"""Which class methods exist, and whether they may change the object."""

from __future__ import annotations

import errno
import importlib
import threading
from collections.abc import Callable

from librbd_py.format.values import dataclass

from .context import Context

Body = Callable[[Context, bytes], bytes]


@dataclass(frozen=True)
class Method:
    cls: str
    name: str
    writes: bool
    body: Body


_methods: dict[tuple[str, str], Method] = {}
_loading = threading.Lock()
# Module and class -> methods. A module is loaded when one of its methods is asked for.
_FILES = {
    ("cls_lock", "lock"): "lock unlock break_lock get_info list_locks assert_locked set_cookie",
    ("rbd_header", "rbd"): (
        "create get_size set_size get_features set_features get_all_features get_flags set_flags "
        "op_features_get op_features_set get_object_prefix get_data_pool get_stripe_unit_count "
        "set_stripe_unit_count get_create_timestamp get_access_timestamp get_modify_timestamp "
        "set_access_timestamp set_modify_timestamp"
    ),
    ("rbd_snapshots", "rbd"): (
        "get_snapcontext snapshot_add snapshot_get get_snapshot_name get_snapshot_timestamp snapshot_remove "
        "snapshot_rename snapshot_trash_add snapshot_get_limit snapshot_set_limit get_protection_status "
        "set_protection_status"
    ),
    ("rbd_parents", "rbd"): (
        "parent_get parent_overlap_get parent_attach parent_detach get_parent set_parent remove_parent "
        "child_attach child_detach children_list add_child remove_child get_children"
    ),
    ("rbd_metadata", "rbd"): (
        "metadata_list metadata_get metadata_set metadata_remove image_group_add image_group_remove "
        "image_group_get migration_set migration_set_state migration_get migration_remove"
    ),
    ("rbd_directory", "rbd"): (
        "dir_get_id dir_get_name dir_list dir_add_image dir_remove_image dir_rename_image dir_state_assert "
        "dir_state_set get_id set_id namespace_add namespace_remove namespace_list group_dir_list "
        "group_dir_add group_dir_rename group_dir_remove"
    ),
    ("rbd_trash", "rbd"): "trash_add trash_remove trash_get trash_list trash_state_set",
    ("rbd_groups", "rbd"): (
        "group_image_set group_image_remove group_image_list group_snap_set group_snap_remove "
        "group_snap_get_by_id group_snap_list"
    ),
    ("rbd_object_map", "rbd"): (
        "object_map_load object_map_save object_map_resize object_map_update object_map_snap_add object_map_snap_remove"
    ),
    ("rbd_data", "rbd"): "copyup sparse_copyup sparsify assert_snapc_seq",
    ("hello", "hello"): "say_hello record_hello replay",
}
_WHERE = {(cls, name): file for (file, cls), names in _FILES.items() for name in names.split()}


def method(cls: str, name: str, *, writes: bool) -> Callable[[Body], Body]:
    """Decorator: registers a class method."""

    def register(body: Body) -> Body:
        if (cls, name) in _methods:
            raise ValueError(f"class method {cls}.{name} is defined twice")
        if _WHERE.get((cls, name)) != body.__module__.rpartition(".")[2]:
            raise ValueError(f"class method {cls}.{name} is not in the table of its module's methods")
        _methods[cls, name] = Method(cls, name, writes, body)
        return body

    return register


def find(cls: str, name: str) -> Method:
    """EOPNOTSUPP for a class or a method that is not there."""
    found = _methods.get((cls, name))
    if found is None and (cls, name) in _WHERE:
        with _loading:  # two threads at once: neither may look into half a table
            importlib.import_module(f"librbd_py.store.classes.{_WHERE[cls, name]}")
        found = _methods.get((cls, name))
    if found is None:
        raise OSError(errno.EOPNOTSUPP, f"no class method {cls}.{name}")
    return found

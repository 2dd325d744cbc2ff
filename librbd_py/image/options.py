"""The options of RBD that a pool or an image may override: their names, defaults and what may be their value.

Source: `rbd config pool list` and `rbd config image list` of Ceph 16.2.15. Those that mean nothing to this library are
kept and shown too, so that programs and scripts written for Ceph find them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Container

# what only a pool may override
OF_POOLS = {
    "rbd_default_clone_format": "auto",
    "rbd_default_data_pool": "",
    "rbd_default_features": "61",
    "rbd_default_order": "22",
    "rbd_default_stripe_count": "0",
    "rbd_default_stripe_unit": "0",
    "rbd_journal_order": "24",
    "rbd_journal_pool": "",
    "rbd_journal_splay_width": "4",
    "rbd_mirror_concurrent_image_deletions": "1",
    "rbd_mirror_concurrent_image_syncs": "5",
    "rbd_mirror_delete_retry_interval": "30.000000",
    "rbd_mirror_image_perf_stats_prio": "5",
    "rbd_mirror_image_policy_migration_throttle": "300",
    "rbd_mirror_image_policy_rebalance_timeout": "0.000000",
    "rbd_mirror_image_policy_type": "simple",
    "rbd_mirror_image_policy_update_throttle_interval": "1.000000",
    "rbd_mirror_image_state_check_interval": "30",
    "rbd_mirror_journal_commit_age": "5.000000",
    "rbd_mirror_journal_poll_age": "5.000000",
    "rbd_mirror_leader_heartbeat_interval": "5",
    "rbd_mirror_leader_max_acquire_attempts_before_break": "3",
    "rbd_mirror_leader_max_missed_heartbeats": "2",
    "rbd_mirror_memory_autotune": "true",
    "rbd_mirror_memory_base": "805306368",
    "rbd_mirror_memory_cache_autotune_interval": "30.000000",
    "rbd_mirror_memory_cache_min": "134217728",
    "rbd_mirror_memory_cache_resize_interval": "5.000000",
    "rbd_mirror_memory_expected_fragmentation": "0.150000",
    "rbd_mirror_memory_target": "4294967296",
    "rbd_mirror_perf_stats_prio": "5",
    "rbd_mirror_sync_point_update_age": "30.000000",
}
# what an image may override too
OF_IMAGES = {
    "rbd_atime_update_interval": "60",
    "rbd_balance_parent_reads": "false",
    "rbd_balance_snap_reads": "false",
    "rbd_blkin_trace_all": "false",
    "rbd_blocklist_expire_seconds": "0",
    "rbd_blocklist_on_break_lock": "true",
    "rbd_cache": "true",
    "rbd_cache_block_writes_upfront": "false",
    "rbd_cache_max_dirty": "25165824",
    "rbd_cache_max_dirty_age": "1.000000",
    "rbd_cache_max_dirty_object": "0",
    "rbd_cache_policy": "writearound",
    "rbd_cache_size": "33554432",
    "rbd_cache_target_dirty": "16777216",
    "rbd_cache_writethrough_until_flush": "false",
    "rbd_clone_copy_on_read": "false",
    "rbd_compression_hint": "none",
    "rbd_concurrent_management_ops": "10",
    "rbd_default_map_options": "",
    "rbd_default_snapshot_quiesce_mode": "required",
    "rbd_disable_zero_copy_writes": "true",
    "rbd_discard_granularity_bytes": "65536",
    "rbd_enable_alloc_hint": "true",
    "rbd_invalidate_object_map_on_timeout": "true",
    "rbd_io_scheduler": "simple",
    "rbd_io_scheduler_simple_max_delay": "0",
    "rbd_journal_commit_age": "5.000000",
    "rbd_journal_max_concurrent_object_sets": "0",
    "rbd_journal_max_payload_bytes": "16384",
    "rbd_journal_object_flush_age": "0.000000",
    "rbd_journal_object_flush_bytes": "1048576",
    "rbd_journal_object_flush_interval": "0",
    "rbd_journal_object_max_in_flight_appends": "0",
    "rbd_journal_object_writethrough_until_flush": "true",
    "rbd_localize_parent_reads": "false",
    "rbd_localize_snap_reads": "false",
    "rbd_mirroring_delete_delay": "0",
    "rbd_mirroring_max_mirroring_snapshots": "5",
    "rbd_mirroring_replay_delay": "0",
    "rbd_mirroring_resync_after_disconnect": "false",
    "rbd_move_parent_to_trash_on_remove": "false",
    "rbd_move_to_trash_on_remove": "false",
    "rbd_move_to_trash_on_remove_expire_seconds": "0",
    "rbd_mtime_update_interval": "60",
    "rbd_non_blocking_aio": "true",
    "rbd_parent_cache_enabled": "false",
    "rbd_persistent_cache_mode": "disabled",
    "rbd_persistent_cache_path": "/tmp",
    "rbd_persistent_cache_size": "1073741824",
    "rbd_plugins": "",
    "rbd_qos_bps_burst": "0",
    "rbd_qos_bps_burst_seconds": "1",
    "rbd_qos_bps_limit": "0",
    "rbd_qos_iops_burst": "0",
    "rbd_qos_iops_burst_seconds": "1",
    "rbd_qos_iops_limit": "0",
    "rbd_qos_read_bps_burst": "0",
    "rbd_qos_read_bps_burst_seconds": "1",
    "rbd_qos_read_bps_limit": "0",
    "rbd_qos_read_iops_burst": "0",
    "rbd_qos_read_iops_burst_seconds": "1",
    "rbd_qos_read_iops_limit": "0",
    "rbd_qos_schedule_tick_min": "50",
    "rbd_qos_write_bps_burst": "0",
    "rbd_qos_write_bps_burst_seconds": "1",
    "rbd_qos_write_bps_limit": "0",
    "rbd_qos_write_iops_burst": "0",
    "rbd_qos_write_iops_burst_seconds": "1",
    "rbd_qos_write_iops_limit": "0",
    "rbd_quiesce_notification_attempts": "10",
    "rbd_read_from_replica_policy": "default",
    "rbd_readahead_disable_after_bytes": "52428800",
    "rbd_readahead_max_bytes": "524288",
    "rbd_readahead_trigger_requests": "10",
    "rbd_request_timed_out_seconds": "30",
    "rbd_skip_partial_discard": "true",
    "rbd_sparse_read_threshold_bytes": "65536",
}
OPTIONS = dict(sorted((OF_POOLS | OF_IMAGES).items()))

# those that are known beside them, for everybody
_GLOBAL = (
    "rbd_auto_exclusive_lock_until_manual_request",
    "rbd_config_pool_override_update_timestamp",
    "rbd_default_format",
    "rbd_default_pool",
    "rbd_op_thread_timeout",
    "rbd_op_threads",
    "rbd_tracing",
    "rbd_validate_names",
    "rbd_validate_pool",
)
_CHOICES = {
    "rbd_cache_policy": ("writethrough", "writeback", "writearound"),
    "rbd_compression_hint": ("none", "compressible", "incompressible"),
    "rbd_default_clone_format": ("1", "2", "auto"),
    "rbd_default_snapshot_quiesce_mode": ("required", "ignore-error", "skip"),
    "rbd_io_scheduler": ("none", "simple"),
    "rbd_mirror_image_policy_type": ("none", "simple"),
    "rbd_persistent_cache_mode": ("disabled", "rwl", "ssd"),
    "rbd_read_from_replica_policy": ("default", "balance", "localize"),
}
_NUMBER = re.compile(r"\d{1,20}([KMGTPE]i?)?|\d{1,20}B")


def known(name: str) -> bool:
    return name in OPTIONS or name in _GLOBAL


def acceptable(name: str, value: str) -> bool:
    """May `value` be the value of an option of OPTIONS?"""
    default = OPTIONS[name]
    if name in _CHOICES:
        return value in _CHOICES[name]
    if default in ("true", "false"):
        return value.lower() in ("true", "false") or re.fullmatch(r"-?\d{1,9}", value) is not None
    if name == "rbd_default_features":
        return bool(value)  # names or a number
    if re.fullmatch(r"\d+\.\d+", default):
        return re.fullmatch(r"\d{1,20}(\.\d*)?([eE][-+]?\d{1,3})?", value) is not None
    if default.isdigit():
        return _NUMBER.fullmatch(value) is not None
    return True


def shown(name: str, value: str) -> str:
    """A value as Ceph prints it: switches as words, numbers without units."""
    default = OPTIONS.get(name, "")
    if default in ("true", "false"):
        return "false" if value.lower() in ("false", "0") else "true"
    if re.fullmatch(r"\d+\.\d+", default):
        return f"{float(value):.6f}"
    return value


def require(name: str, value: str, allowed: Container[str]) -> None:
    """EINVAL unless the option is one of `allowed` and may have this value."""
    if name not in allowed or not acceptable(name, value):
        raise OSError(errno.EINVAL, f"{value!r} is no value of {name} here")

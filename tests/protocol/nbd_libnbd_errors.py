"""Run by /usr/bin/python3 (Debian's libnbd): a client that by-passes its own checks. usage: nbd_libnbd_errors.py URI"""

import errno
import sys

import nbd

EXPECTED = []


def expect(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == code, (call.__name__, args, kwargs, error.errno)
        EXPECTED.append(code)
        return
    raise AssertionError(f"{call.__name__}{args} succeeded")


h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
h.set_strict_mode(0)
size = h.get_size()
assert h.get_structured_replies_negotiated() and h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
assert h.can_multi_conn() and h.can_df() and h.can_fua() and h.can_flush() and h.can_cache() and h.can_fast_zero()
assert (h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_MAXIMUM)) == (1, 32 << 20)

expect(errno.EINVAL, h.pread, 512, size)
expect(errno.EINVAL, h.pread, 512, size - 1)
expect(errno.ENOSPC, h.pwrite, bytes(512), size)
expect(errno.ENOSPC, h.zero, 512, size)
expect(errno.EINVAL, h.trim, 512, size)
expect(errno.EINVAL, h.block_status, 512, size, lambda *_: 0)
expect(errno.EINVAL, h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_DF)
expect(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
expect(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_REQ_ONE)
expect(errno.ENOTSUP, h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
expect(errno.EOVERFLOW, h.pread, (32 << 20) + 1, 0)
expect(errno.EINVAL, h.pwrite, bytes((32 << 20) + 1), 0)

h.pwrite(b"still in step", 1000, nbd.CMD_FLAG_FUA)
assert h.pread(13, 1000) == b"still in step"
extents = []
h.block_status(1 << 20, 0, lambda context, offset, entries, err: extents.extend(entries) or 0, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2
h.flush()
h.shutdown()

# two handles, multi-conn: what one wrote and flushed the other reads
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri(sys.argv[1])
b.connect_uri(sys.argv[1])
a.pwrite(b"from a", 5000)
a.flush()
assert b.pread(6, 5000) == b"from a"
a.shutdown()
b.shutdown()

# option mode
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
names = []
assert h.opt_list(lambda name, description: names.append((name, description)) or 0) == 1
assert names == [("", "a layout")], names
h.set_export_name("nobody")
expect(errno.ENOENT, h.opt_info)
expect(errno.ENOENT, h.opt_go)
h.set_export_name("")
h.opt_info()
assert h.get_size() == size
h.opt_abort()
print(len(EXPECTED))

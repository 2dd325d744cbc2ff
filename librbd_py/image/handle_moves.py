"""The exclusive lock of an open image moves with its VM: what the two ends of a live migration call.

How it moves is in control/handoff.py.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from librbd_py.control import wire
from librbd_py.control.driver import HeaderControl
from librbd_py.control.pool import control_pool
from librbd_py.format import features as ft
from librbd_py.store.api import ObjectContext

from . import object_map
from .handle_lock import DRAIN_SECONDS, HandleLock
from .header import Header
from .view import EVERYTHING

OFFER_SECONDS = 2.0  # how long a client that leaves waits for a lock it does not have


class HandleMoves(HandleLock):
    """Requests are parked here, at the image's gate, while the lock moves."""

    def __init__(
        self, ctx: ObjectContext, name: str, header: Header, *, read_only: bool, snap_id: int, alone: bool = False
    ) -> None:
        self._parked = False  # the gate is closed for a hand-off; guarded by _state
        super().__init__(ctx, name, header, read_only=read_only, snap_id=snap_id, alone=alone)

    def offer(self, key: str, seconds: float = OFFER_SECONDS) -> bool:
        """The VM `key` ("*": unknown) leaves: parks all requests, drains, flushes and offers the lock to its next host.
        True: it may take it from now on, and requests stay parked until `take_back` or `close`. False: the lock is
        another client's; requests go on. OSError (ETIMEDOUT: requests in flight do not end; what flushing said):
        everything is as before, unless `handing_over`: the store did not say whether it is offered, so it is as after
        True. EINVAL: the image has no exclusive lock.
        """
        control = self._moving_control()
        parked_here = self._park()
        offered = False
        try:
            offered = control.offer(key, seconds)
        finally:
            if parked_here and not (offered or control.offered):
                self._unpark()
        return offered

    def take_back(self) -> None:
        """The VM stays after all: owns the lock again and lets requests go on. ESTALE: a stranger owned the lock
        meanwhile; requests stay parked."""
        self._moving_control().take_back()
        self._unpark()

    def stand_by(self, key: str, *, park: bool) -> None:
        """The VM `key` will come here from the host that owns the lock now. `park`: requests wait for `take_over`; else
        reads are answered. EBUSY: this handle owns the lock, offers it or is after it. EINVAL: no exclusive lock. After
        an error it does not stand by and nothing is parked, unless by an `offer`."""
        control = self._moving_control()
        if park:
            self._park()
        try:
            self._rehearse()
            control.stand_by(key)
        except BaseException:
            if not control.moving:
                self._unpark()
            raise
        if not park:
            self._unpark()

    def _rehearse(self) -> None:
        """What `take_over` or `offer` will run while a VM stands still has run once."""
        with suppress(OSError):
            wire.rehearse(self.ctx)
            if self._header.has(ft.OBJECT_MAP):
                object_map.load(self.ctx, self.id)

    def stand_down(self) -> None:
        """After `stand_by`, or an `offer` that was taken: the VM is not here. Requests go on, and the lock is taken as
        ever, when a write needs it."""
        self._moving_control().stand_down()
        self._unpark()
        with self._state:
            if not self.closed:
                self._publish()  # a write that waited has asked once, in vain: the new view makes it ask again

    def lock_offered_to(self, key: str) -> bool:
        """Whether the lock's owner offers it to the VM `key` just now."""
        return self._moving_control().offered_to(key)

    def take_over(self, force: bool = False) -> None:
        """The VM runs here from now on: takes the lock and lets requests go on. ESTALE: a stranger owned it after
        `stand_by`; requests stay parked, until `force`."""
        self._moving_control().take_over(force)
        self._unpark()

    @property
    def serves_vms(self) -> bool:
        """A VM may come here without notice: a lock that is offered to a VM that nobody knows ("*") is taken by the
        first write. False at first."""
        return self.control is not None and self.control.heir

    @serves_vms.setter
    def serves_vms(self, serves: bool) -> None:
        if self.control is not None:
            self.control.heir = serves
            if serves:
                control_pool().submit(self._rehearse)

    @property
    def moving(self) -> bool:
        """Only `take_back`, `take_over` and `stand_down` let requests go on that need the lock."""
        return self.control is not None and self.control.moving

    @property
    def handing_over(self) -> bool:
        """The lock is offered and not taken yet, as far as is known: closing the handle would take the offer away."""
        return self.control is not None and self.control.offered

    def _moving_control(self) -> HeaderControl:
        if self._lost is not None:
            raise OSError(self._lost.errno, self._lost.strerror)
        if self.control is None or not self.uses_lock:
            raise OSError(errno.EINVAL, "the image has no exclusive lock to hand over")
        return self.control

    def _park(self) -> bool:
        """Whether it was this call that parked them."""
        with self._state:
            if self._parked:
                return False
            self._parked = True
        try:
            self.data.block(EVERYTHING, DRAIN_SECONDS)
        except BaseException:
            self._parked = False
            raise
        return True

    def _unpark(self) -> None:
        with self._state:
            parked, self._parked = self._parked, False
        if parked:
            self.data.unblock(EVERYTHING)

"""Which accelerator a guest really runs under.

/dev/kvm is no proof: on some hosts it opens, creates a VM and then hangs the guest, or runs a boot sector and
hangs Linux. So the guest's own kernel is booted under KVM and has a deadline to say that it is up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

QEMU = "qemu-system-x86_64"
DEADLINE = 12.0  # seconds; under a real KVM the kernel is up in about one
SAYS = "GUEST-PROBE ok"


def cpu_of(accel: str) -> str:
    """The CPU model guests get under an accelerator."""
    return "host" if accel == "kvm" else "qemu64"


def probe_kvm(kernel: Path, initrd: Path, deadline: float = DEADLINE) -> str | None:
    """None when `kernel` with `initrd` (of `vm_images`, rbdpy.mode=probe) runs under KVM, else a sentence why not."""
    if shutil.which(QEMU) is None:
        raise FileNotFoundError(f"{QEMU} is not installed (package qemu-system-x86)")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing or may not be opened"
    command = [QEMU, "-accel", "kvm", "-machine", "q35", "-cpu", cpu_of("kvm"), "-m", "256", "-display", "none"]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel)]
    command += ["-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=1 no_timer_check rbdpy.mode=probe"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=deadline
        )
    except subprocess.TimeoutExpired:
        return f"/dev/kvm opens, but a guest under KVM was not up within {deadline:.0f} s"
    said = done.stdout.decode("utf-8", "replace")
    if SAYS in said:
        return None
    lines = said.strip().splitlines()
    return f"a guest under KVM ended with status {done.returncode}" + (f": {lines[-1]}" if lines else "")


def accelerator(kernel: Path, initrd: Path, cache: Path | None = None) -> tuple[str, str]:
    """("kvm" | "tcg", a sentence why). With `cache` (a folder) the answer is kept until the next reboot of the host."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    kept = cache / "accelerator.json" if cache else None
    if kept and kept.exists():
        try:
            old = json.loads(kept.read_text())
            if old["boot_id"] == boot and old["accelerator"] in ("kvm", "tcg"):
                return str(old["accelerator"]), str(old["why"])
        except (ValueError, KeyError, TypeError):
            pass  # an unreadable answer is asked again
    reason = probe_kvm(kernel, initrd)
    answer = ("tcg", f"{reason}; using TCG") if reason else ("kvm", "a probe guest ran under KVM")
    if kept:
        kept.write_text(json.dumps({"boot_id": boot, "accelerator": answer[0], "why": answer[1]}))
    return answer


def memory_of(mib: int, accel: str) -> str:
    """The guest's memory as QEMU's options want it. Under TCG a little more than asked for: QEMU before 9.0 spoils the
    memory of guests that migrate when it is a multiple of 256 KiB (cpu_physical_memory_sync_dirty_bitmap clears dirty
    bits of such blocks on a fast path that leaves the TLBs of vCPUs as they are: what they write then is missed)."""
    return f"{mib * 1024 + 8}K" if accel.startswith("tcg") else f"{mib}M"


def cpus_of(cpus: int, accel: str) -> str:
    """The value of -smp. Under TCG a machine that could have one more CPU: for others QEMU before 8.0 leaves out its
    memory barriers (tcg_gen_mb), also where the other side is a back end in another process. Then an interrupt or a
    kick is lost now and then (VIRTIO_RING_F_EVENT_IDX lives by barriers), and a guest waits for ever."""
    return f"{cpus},maxcpus={max(2, cpus)}" if accel.startswith("tcg") else str(cpus)

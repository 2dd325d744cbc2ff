"""The host service (`rbdpyd --host`): sockets of VMs and images, an open image for each QEMU that connects, and what
libvirt's hook says. Nothing here calls libvirt: it may be waiting for the answer to a hook.
"""

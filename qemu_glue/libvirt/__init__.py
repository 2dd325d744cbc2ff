"""libvirt's side of the host service: domain XML in, domain XML out. Nothing here calls libvirt."""

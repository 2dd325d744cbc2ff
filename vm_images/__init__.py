"""Builders of small bootable test guests: Debian's kernel, busybox and a verifier, reproducible and cached."""

"""Runnable examples of `qemu_glue.qmp`: `python -m qemu_glue.examples.NAME`. Each brings its own store, service and
guest."""

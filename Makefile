# Everything a newcomer or CI needs. `make help` lists the targets.
#
# Nothing has to be installed by hand: each target installs the Debian packages it needs (as root) and keeps Python
# packages in .venv.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CACHE := .cache

PACKAGES_BUILD := gcc libc6-dev python3-dev python3-venv
PACKAGES_BOOT := $(PACKAGES_BUILD) qemu-system-x86 qemu-utils seabios ipxe-qemu busybox-static mtools dosfstools \
	syslinux syslinux-common
PACKAGES_CEPH := ceph-mon ceph-osd librados2
PACKAGES_TEST := $(PACKAGES_BOOT) $(PACKAGES_CEPH) ceph-mgr radosgw openssl qemu-system-common qemu-block-extra nbdkit libnbd-bin libnbd0 \
	python3-libnbd fio clang-14 libclang-rt-14-dev e2fsprogs xfsprogs mount util-linux python3-rados python3-rbd ceph-common iproute2 \
	sqlite3 gdb libvirt-daemon-system libvirt-clients libvirt-dev pkg-config
NATIVE := $(wildcard native/*/*.c native/*/*.h native/ffi/build.py)

.PHONY: help setup setup-test boot test check asan tsan fuzz bench soak lint clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

# $(call debian,NAME,PACKAGES): installs what is missing, once per list
define debian
@mkdir -p $(CACHE); \
missing=$$(for p in $(2); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || echo $$p; done); \
if [ -n "$$missing" ]; then \
	echo "installing Debian packages:" $$missing; \
	[ "$$(id -u)" = 0 ] || { echo "not root: run  apt-get install" $$missing; exit 1; }; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get install -q -y --no-install-recommends $$missing >$(CACHE)/apt.log 2>&1 || \
	{ apt-get update -q >$(CACHE)/apt.log 2>&1; apt-get install -q -y --no-install-recommends $$missing >>$(CACHE)/apt.log 2>&1; } || \
	{ tail -20 $(CACHE)/apt.log; echo "installing packages failed: see $(CACHE)/apt.log"; exit 1; }; \
fi
endef

setup: $(VENV)/installed ## Debian packages for `make boot`, virtual environment, compiled extension

.PHONY: packages-build packages-boot packages-ceph packages-test
packages-build:
	$(call debian,build,$(PACKAGES_BUILD))
packages-boot:
	$(call debian,boot,$(PACKAGES_BOOT))
packages-ceph:
	$(call debian,ceph,$(PACKAGES_CEPH))
packages-test:
	$(call debian,test,$(PACKAGES_TEST))

$(VENV)/bin/python: | packages-build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py $(NATIVE) | $(VENV)/bin/python
	@echo "building the package"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e . >$(CACHE)/pip.log 2>&1 || { tail -30 $(CACHE)/pip.log; exit 1; }
	@touch $@

$(VENV)/developing: $(VENV)/installed
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[dev,host]' >$(CACHE)/pip.log 2>&1 || { tail -30 $(CACHE)/pip.log; exit 1; }
	@touch $@

setup-test: packages-test $(VENV)/developing ## what the tests and checks need

boot: packages-boot $(if $(filter ceph,$(STORE)),packages-ceph) $(VENV)/installed ## build a guest, put it in an RBD image, boot it over vhost-user-blk and NBD (STORE=ceph: on a cluster of its own)
	@$(PY) -m qemu_glue.boot $(if $(STORE),--store $(STORE))

# Two at once, file by file: half of the suite's time is waiting, for deadlines, watches and daemons.
test: setup-test ## the whole suite
	@$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: lint test ## linters, then the suite

lint: setup-test ## ruff and mypy --strict
	@$(VENV)/bin/ruff check librbd_py qemu_glue vm_images tests native
	@$(VENV)/bin/mypy

asan: setup-test ## C tests under AddressSanitizer and UBSan
	@tests/native/run asan

tsan: setup-test ## C tests under ThreadSanitizer
	@tests/native/run tsan

fuzz: setup-test ## fuzz every parser for FUZZ_SECONDS (default 600) each
	@native/fuzz/run $(or $(FUZZ_SECONDS),600)

bench: setup-test ## side by side with the named peers; writes tests/bench/results
	@$(PY) -m tests.bench$(if $(filter ceph,$(STORE)),.ceph) $(BENCH_ARGS)

soak: setup-test ## the long versions of the random and fault tests
	@RBDPY_SOAK=1 PYTEST_TIMEOUT=0 $(PY) -m pytest -o faulthandler_timeout=0 -m "soak or not soak" $(PYTEST_ARGS)

clean: ## remove everything built
	rm -rf $(VENV) $(CACHE) build dist *.egg-info librbd_py/_native*.so

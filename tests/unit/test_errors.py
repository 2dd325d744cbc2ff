"""The exception trees against Ceph's own modules, and errno to class."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess

import pytest

from librbd_py import errors

SURVEY = """
import importlib, json, sys
out = {}
for name in ("rbd", "rados"):
    try:
        module = importlib.import_module(name)
    except ImportError:
        continue
    tree = out[name] = {}
    for key, cls in vars(module).items():
        if isinstance(cls, type) and issubclass(cls, BaseException):
            mro = [c.__name__ for c in cls.__mro__]
            if key == "ExtendMismatch":
                e = cls("msg", 4100, 5)
                tree[key] = [mro, str(e), e.errno, e.offset]
            elif key == "Error" and name == "rbd":
                tree[key] = [mro, str(cls("msg")), None, None]
            else:
                e = cls("msg", 7)
                tree[key] = [mro, str(e), e.errno, str(cls("msg"))]
print(json.dumps(out))
"""


def survey_of_installed_modules() -> dict[str, dict[str, list[object]]]:
    run = subprocess.run(
        ["/usr/bin/python3", "-c", SURVEY], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    result: dict[str, dict[str, list[object]]] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize("module", ["rbd", "rados"])
def test_names_bases_and_texts_are_those_of_cephs_module(module: str) -> None:
    theirs = survey_of_installed_modules()[module]
    ours = getattr(errors, module)
    for name, (mro, text, code, extra) in theirs.items():
        cls = getattr(ours, name)
        assert [c.__name__ for c in cls.__mro__ if c.__name__ != "_Formatted"] == mro, name
        if name == "ExtendMismatch":
            failure = cls("msg", 4100, 5)
            assert (str(failure), failure.errno, failure.offset) == (text, code, extra)
        elif (module, name) == ("rbd", "Error"):
            assert str(cls("msg")) == text
        else:
            assert (str(cls("msg", 7)), cls("msg", 7).errno, str(cls("msg"))) == (text, code, extra), name
    only_ours = {n for n, c in vars(ours).items() if isinstance(c, type)} - set(theirs)
    assert only_ours == {"OutcomeUnknown"}


@pytest.mark.parametrize("code", sorted(errors.RBD_CLASSES))
def test_rbd_error_keeps_errno_and_sentence(code: int) -> None:
    failure = errors.rbd_error(OSError(code, "the reason"), "doing it")
    assert type(failure) is errors.RBD_CLASSES[code]
    assert failure.errno == code
    assert "doing it: the reason" in str(failure)
    assert errors.rbd_class(-code) is type(failure)


@pytest.mark.parametrize("code", sorted(errors.RADOS_CLASSES))
def test_rados_error_keeps_errno_and_sentence(code: int) -> None:
    failure = errors.rados_error(OSError(code, "the reason"))
    assert type(failure) is errors.RADOS_CLASSES[code]
    assert (failure.errno, failure.message) == (code, "the reason")
    assert errors.rados_class(-code) is type(failure)


def test_an_errno_without_class_is_the_trees_oserror() -> None:
    assert type(errors.rbd_error(OSError(errno.EXDEV, "x"))) is errors.rbd.OSError
    assert type(errors.rados_error(OSError(errno.EXDEV, "x"))) is errors.rados.OSError


def test_not_found_outside_images_is_an_object() -> None:
    assert type(errors.rbd_error(OSError(errno.ENOENT, "x"), objects=True)) is errors.rbd.ObjectNotFound
    assert type(errors.rbd_error(OSError(errno.EEXIST, "x"), objects=True)) is errors.rbd.ObjectExists
    assert type(errors.rbd_error(OSError(errno.EBUSY, "x"), objects=True)) is errors.rbd.ImageBusy


def test_a_failed_comparison_says_where() -> None:
    failure = errors.rados_error(OSError(4095 + 512, "differs"))
    assert isinstance(failure, errors.rados.ExtendMismatch)
    assert failure.offset == 512


def test_outcome_unknown_is_caught_by_its_own_name_on_every_level() -> None:
    below = errors.OutcomeUnknown(errno.ETIMEDOUT, "no answer")
    assert isinstance(below, OSError)
    for face in (errors.rbd_error(below), errors.rados_error(below)):
        assert isinstance(face, errors.OutcomeUnknown)
        assert face.errno == errno.ETIMEDOUT
        assert str(face) == f"[errno 110] {face.args[0]}"
    assert isinstance(errors.rbd_error(below), errors.rbd.Error)
    assert isinstance(errors.rados_error(below), errors.rados.Error)


def test_blocks_translate_once_and_chain_the_cause() -> None:
    with pytest.raises(errors.rbd.ImageBusy) as caught, errors.rbd_errors("outer"), errors.rbd_errors("inner"):
        raise OSError(errno.EBUSY, "in use")
    assert isinstance(caught.value.__cause__, OSError)
    assert "outer" not in str(caught.value)
    with pytest.raises(errors.rados.OutcomeUnknown) as unknown, errors.rados_errors("o"), errors.rados_errors("i"):
        raise errors.OutcomeUnknown(errno.ETIMEDOUT, "lost")
    assert unknown.value.message == "i: lost"


def test_exceptions_survive_pickling() -> None:
    for failure in (errors.rbd.ImageBusy("m", 16), errors.rados.ExtendMismatch("m", 4100, 5)):
        again = pickle.loads(pickle.dumps(failure))
        assert (type(again), again.args, vars(again)) == (type(failure), failure.args, vars(failure))

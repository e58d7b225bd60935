"""Replaced names and import hooks, in a package written for the test."""

import importlib
import sys
import threading

import pytest

from sppo_kernels.integrations._patching import AfterImport, Patch, wrapping


@pytest.fixture
def import_module(tmp_path, monkeypatch):
    """Import function for a package whose modules a and b define ``name``; c imports it from a."""
    folder = tmp_path / "patched_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("def name(): return 'a'\n")
    (folder / "b.py").write_text("def name(): return 'b'\n")
    (folder / "c.py").write_text("from patched_package.a import name\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    finders = list(sys.meta_path)
    yield lambda module: importlib.import_module(f"patched_package.{module}")
    sys.meta_path[:] = finders
    for path in [path for path in sys.modules if path.startswith("patched_package")]:
        del sys.modules[path]


def test_a_name_is_replaced_in_every_module_of_the_package(import_module, monkeypatch):
    a, b, c = map(import_module, "abc")
    monkeypatch.setitem(sys.modules, "patched_package.none", None)
    monkeypatch.setitem(sys.modules, "patched_package.number", 3)
    original, other = a.name, b.name
    patch = Patch("patched_package")
    patch.apply({(a, "name"): len})
    assert (a.name, b.name, c.name) == (len, other, len)
    patch.restore()
    assert (a.name, b.name, c.name) == (original, other, original)


def test_a_name_is_replaced_in_one_module_without_a_package(import_module):
    a, c = import_module("a"), import_module("c")
    original = a.name
    with Patch().apply({(a, "name"): len}):
        assert (a.name, c.name) == (len, original)
    assert a.name is original


def test_the_original_is_known_below_replacements(import_module):
    a = import_module("a")
    original, patch = a.name, Patch()
    assert patch.original(a, "name") is original
    with patch.apply({(a, "name"): len}), patch.apply({(a, "name"): max}):
        assert patch.original(a, "name") is original


def test_a_wrapper_has_the_name_of_the_original(import_module):
    a = import_module("a")
    wrapper = wrapping(lambda original, *args, **kwargs: (original(), args, kwargs))(a.name)
    assert wrapper(1, b=2) == ("a", (1,), {"b": 2})
    assert (wrapper.__module__, wrapper.__qualname__) == (a.name.__module__, a.name.__qualname__)


def test_replacements_are_removed_in_any_order(import_module):
    a = import_module("a")
    original, patch = a.name, Patch()
    first, second = patch.apply({(a, "name"): len}), patch.apply({(a, "name"): max})
    assert a.name is max
    first.close()
    assert a.name is max
    second.close()
    assert a.name is original
    with patch.apply({(a, "name"): len}):
        patch.restore()
        patch.apply({(a, "name"): max})
    assert a.name is max
    patch.restore()
    assert a.name is original


def test_a_missing_name_leaves_all_names_unchanged(import_module):
    a = import_module("a")
    original, patch = a.name, Patch()
    with pytest.raises(AttributeError, match="missing"):
        patch.apply({(a, "name"): len, (a, "missing"): len})
    assert a.name is original
    patch.restore()
    assert a.name is original


def test_threads_may_patch_at_the_same_time(import_module):
    a = import_module("a")
    original, patch, errors = a.name, Patch("patched_package"), []

    def work():
        try:
            for _ in range(300):
                with patch.apply({(a, "name"): len}):
                    assert patch.original(a, "name") is original
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert a.name is original


def test_each_hook_runs_once_after_the_first_import(import_module):
    ran = []
    AfterImport(["patched_package.b", "patched_package.a"], lambda: ran.append(("either", import_module("b").name())))
    AfterImport(["patched_package.a"], lambda: ran.append(("a", sys.modules["patched_package.a"].name())))
    AfterImport(["patched_package.z"], lambda: ran.append("z")).withdraw()
    assert import_module("c").name() == "a"
    assert sorted(ran) == [("a", "a"), ("either", "b")]
    importlib.reload(import_module("a"))
    assert len(ran) == 2
    assert not [finder for finder in sys.meta_path if isinstance(finder, AfterImport)]


def test_a_hook_runs_at_once_for_an_imported_module(import_module):
    import_module("a")
    ran = []
    AfterImport(["patched_package.a"], lambda: ran.append(1))
    assert ran == [1]


def test_a_failed_hook_waits_for_the_next_import(import_module):
    tries = []

    def fail_once():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not yet")

    AfterImport(["patched_package.a"], fail_once)
    with pytest.raises(RuntimeError, match="not yet"):
        import_module("a")
    assert import_module("a").name() == "a"
    assert len(tries) == 2

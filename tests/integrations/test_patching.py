"""Names replaced and put back, and hooks on imports, in a package made for it."""

import importlib
import sys

import pytest

from sppo_kernels.integrations._patching import AfterImport, Patch


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A package whose modules a and b define ``name``; c has taken it from a."""
    folder = tmp_path / "victim_of_patches"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("def name(): return 'a'\n")
    (folder / "b.py").write_text("def name(): return 'b'\n")
    (folder / "c.py").write_text("from victim_of_patches.a import name\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    finders = list(sys.meta_path)
    yield lambda module: importlib.import_module(f"victim_of_patches.{module}")
    sys.meta_path[:] = finders
    for path in [path for path in sys.modules if path.startswith("victim_of_patches")]:
        del sys.modules[path]


def test_everywhere_in_the_package_and_back(victim, monkeypatch):
    a, b, c = map(victim, "abc")
    monkeypatch.setitem(sys.modules, "victim_of_patches.none", None)
    monkeypatch.setitem(sys.modules, "victim_of_patches.number", 3)
    original, other = a.name, b.name
    patch = Patch("victim_of_patches")
    patch.apply({(a, "name"): len})
    assert (a.name, b.name, c.name) == (len, other, len)
    patch.restore()
    assert (a.name, b.name, c.name) == (original, other, original)


def test_in_one_module_without_a_package(victim):
    a, c = victim("a"), victim("c")
    original = a.name
    with Patch().apply({(a, "name"): len}):
        assert (a.name, c.name) == (len, original)
    assert a.name is original


def test_left_in_any_order(victim):
    a = victim("a")
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


def test_all_names_or_none(victim):
    a = victim("a")
    original, patch = a.name, Patch()
    with pytest.raises(AttributeError, match="missing"):
        patch.apply({(a, "name"): len, (a, "missing"): len})
    assert a.name is original
    patch.restore()
    assert a.name is original


def test_hooks_run_once_each_after_the_first_of_their_modules(victim):
    ran = []
    AfterImport(["victim_of_patches.b", "victim_of_patches.a"], lambda: ran.append(("either", victim("b").name())))
    AfterImport(["victim_of_patches.a"], lambda: ran.append(("a", sys.modules["victim_of_patches.a"].name())))
    AfterImport(["victim_of_patches.z"], lambda: ran.append("z")).withdraw()
    assert victim("c").name() == "a"
    assert sorted(ran) == [("a", "a"), ("either", "b")]
    importlib.reload(victim("a"))
    assert len(ran) == 2
    assert not [finder for finder in sys.meta_path if isinstance(finder, AfterImport)]


def test_a_hook_runs_now_if_its_module_has_been_imported(victim):
    victim("a")
    ran = []
    AfterImport(["victim_of_patches.a"], lambda: ran.append(1))
    assert ran == [1]


def test_a_hook_that_fails_waits_for_the_next_import(victim):
    tries = []

    def fail_once():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not yet")

    AfterImport(["victim_of_patches.a"], fail_once)
    with pytest.raises(RuntimeError, match="not yet"):
        victim("a")
    assert victim("a").name() == "a"
    assert len(tries) == 2

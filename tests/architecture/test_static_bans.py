"""What the package never does: execute what it reads, swallow errors, write files outside the durable store."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source import modules

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.jit.load", "numpy.load", "np.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all",
    "os.system", "os.popen",
}  # fmt: skip
BANNED_METHODS = {"extractall"}

# (file, what): each with the reason why it is safe there.
ALLOWED: dict[tuple[str, str], str] = {
    ("checkpoint/import_transformers.py", "torch.load"): "weights_only=True: checkpoints of transformers, on request",
}

# Files that write on purpose: the durable store and the sinks of a run. All others hand their bytes to these.
WRITERS = ("checkpoint/", "observe/", "cli/", "demo/", "search/")

# Single calls elsewhere, each with its reason.
ALLOWED_WRITES: dict[tuple[str, str], str] = {
    ("callbacks.py", "write_text"): "TrainerState.save_to_json: public, writes the file that its caller names",
    ("model/adapter.py", "write_bytes"): "the model card of the last checkpoint, into the draft of the next",
    ("data/token_worker.py", "fdopen(..., 'wb')"): "the pipe to the parent process, not a file",
    (
        "data/cache.py",
        "open(..., 'xb')",
    ): "the user's cache: into a draft that is renamed, and checked before it is read",
    ("data/cache.py", "write_text"): "likewise",
    ("data/template_worker.py", "fdopen(..., 'wb')"): "the pipe to the parent process, not a file",
}


def name_of(node: ast.expr) -> str:
    """`torch.load` of the expression `torch.load`; only the last part where the rest is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = name_of(node.value)
        return f"{owner}.{node.attr}" if owner else node.attr
    return ""


def violations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything banned in a file, before the allowances."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in BANNED_CALLS or name.split(".")[-1] in BANNED_METHODS:
                yield node.lineno, name
            if any(keyword.arg == "shell" and not is_false(keyword.value) for keyword in node.keywords):
                yield node.lineno, "shell=True"
            if any(keyword.arg == "allow_pickle" and not is_false(keyword.value) for keyword in node.keywords):
                yield node.lineno, "allow_pickle=True"
            if any(keyword.arg == "trust_remote_code" and is_true(keyword.value) for keyword in node.keywords):
                yield node.lineno, "trust_remote_code=True"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        elif isinstance(node, ast.ExceptHandler) and swallows_everything(node):
            yield node.lineno, "except that swallows everything"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    """`except Exception: pass`: nobody ever hears of the error."""
    broad = isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    return broad and all(isinstance(statement, ast.Pass) for statement in handler.body)


def writes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, call) of every call that opens a file for writing or writes a whole file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func).split(".")[-1]
        if name in ("write_text", "write_bytes"):
            yield node.lineno, name
        elif name in ("open", "fdopen"):
            position = 1 if isinstance(node.func, ast.Name) or name == "fdopen" else 0
            modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[position:]
            for mode in modes[:1]:
                text = mode.value if isinstance(mode, ast.Constant) else ""
                if isinstance(text, str) and set(text) & set("wax+"):
                    yield node.lineno, f"{name}(..., {text!r})"


@pytest.mark.parametrize("path", list(modules()))
def test_nothing_banned(path: str) -> None:
    found = [f"{path}:{line} {what}" for line, what in violations(path, modules()[path]) if (path, what) not in ALLOWED]
    assert found == []


@pytest.mark.parametrize("path", [path for path in modules() if not path.startswith(WRITERS)])
def test_files_are_written_by_the_store_and_the_sinks(path: str) -> None:
    found = [f"{path}:{line} {call}" for line, call in writes(modules()[path]) if (path, call) not in ALLOWED_WRITES]
    assert found == []


def test_every_torch_load_that_is_allowed_reads_weights_only() -> None:
    for path, what in ALLOWED:
        if what != "torch.load" or path not in modules():
            continue
        for node in ast.walk(modules()[path]):
            if isinstance(node, ast.Call) and name_of(node.func) == "torch.load":
                assert any(word.arg == "weights_only" and is_true(word.value) for word in node.keywords)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("x = eval('1')", "eval"),
        ("torch.load(f)", "torch.load"),
        ("archive.extractall()", "archive.extractall"),
        ("subprocess.run(c, shell=True)", "shell=True"),
        ("load(f, trust_remote_code=True)", "trust_remote_code=True"),
        ("try:\n    f()\nexcept:\n    raise", "bare except"),
        ("try:\n    f()\nexcept Exception:\n    pass", "except that swallows everything"),
    ],
)
def test_the_ban_sees_what_it_bans(code: str, what: str) -> None:
    assert [found for _, found in violations("x.py", ast.parse(code))] == [what]


@pytest.mark.parametrize("code", ["open('a', 'w')", "path.open('ab')", "p.write_text('')", "open(f, mode='x')"])
def test_the_ban_sees_writes(code: str) -> None:
    assert len(list(writes(ast.parse(code)))) == 1

"""Who may import whom: rooms know a few shared modules and themselves, the loop knows nearly nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from source import modules, running_nodes

ROOMS = {"data", "model", "optim", "kernels", "parallel", "checkpoint", "observe", "search", "demo"}
SHARED = {
    "__version__",
    "errors",
    "arguments",
    "argument_checks",
    "argument_fields",
    "argument_names",
    "precision",
    "outputs",
    "private_cache",
    "collection",
}
LOOPS = {"loop.py": SHARED | {"callbacks"}, "evaluation.py": SHARED | {"callbacks"}}

# (importing file, imported module): what a room needs of another, each for its reason.
EXCEPTIONS: set[tuple[str, str]] = {
    ("model/packing.py", "kernels"),  # a packed forward swaps the attention, which only the plan of kernels may do
    ("model/paths.py", "kernels"),  # and which path is taken depends on whether that plan fits
}

# (file, package): files that are themselves imported only where the package is there.
OPTIONAL_FILES: set[tuple[str, str]] = {
    ("kernels/attention_operator.py", "triton"),  # torch for CUDA comes with it, and nothing else imports the file
    ("kernels/fused.py", "triton"),
    ("kernels/fused_attention.py", "triton"),
    ("kernels/fused_attention_backward.py", "triton"),
    ("kernels/fused_cross_entropy.py", "triton"),
    ("kernels/fused_fp8.py", "triton"),
    ("kernels/fused_factors.py", "triton"),
    ("kernels/fused_gate.py", "triton"),
    ("kernels/fused_heads.py", "triton"),
    ("kernels/fused_norm.py", "triton"),
    ("kernels/fused_tiles.py", "triton"),
    ("kernels/transfer.py", "triton"),
}

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy"}
ALWAYS_THERE = HEAVY - {"accelerate", "datasets"} | {"typer", "rich", "yaml", "click", "tokenizers", "huggingface_hub"}


def imported_from_etude(path: str, tree: ast.Module) -> set[str]:
    """The first name below `etude` of everything that `path` imports while running, `data` for `etude.data.order`."""
    found = set()
    for node in running_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "etude" else [node.module]
        found |= {name.split(".")[1] for name in names if name and name.startswith("etude.")}
    return found


def room_of(path: str) -> str | None:
    room = path.split("/")[0]
    return room if room in ROOMS else None


@pytest.mark.parametrize("path", [path for path in modules() if room_of(path)])
def test_a_room_imports_only_itself_and_what_all_share(path: str) -> None:
    allowed = SHARED | {room_of(path)} | {target for source, target in EXCEPTIONS if source == path}
    assert imported_from_etude(path, modules()[path]) <= allowed


@pytest.mark.parametrize("path", LOOPS)
def test_the_loops_import_nearly_nothing(path: str) -> None:
    assert imported_from_etude(path, modules()[path]) <= LOOPS[path]


@pytest.mark.parametrize("path", [path for path in modules() if not path.startswith("cli/")])
def test_nothing_but_the_command_imports_the_command(path: str) -> None:
    assert "cli" not in imported_from_etude(path, modules()[path])


def test_every_exception_is_used() -> None:
    for path, target in EXCEPTIONS:
        if path in modules():
            assert target in imported_from_etude(path, modules()[path]), f"{path} no longer needs {target}"


@pytest.mark.parametrize("path", list(modules()))
def test_optional_packages_are_imported_where_they_are_used(path: str) -> None:
    """At the top of a file only what every installation has."""
    for node in modules()[path].body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package = name.split(".")[0]
            allowed = ALWAYS_THERE | {target for source, target in OPTIONAL_FILES if source == path}
            assert package in allowed | {"etude", "__future__"} | sys.stdlib_module_names, (
                f"{path}:{node.lineno} imports {package}; import it in the function that needs it, with errors.require"
            )


@pytest.mark.parametrize(("target", "package"), sorted(OPTIONAL_FILES))
def test_optional_files_are_imported_where_they_are_used(target: str, package: str) -> None:
    """At the top of no file but those that need the package themselves, so that whoever lacks it never meets them."""
    name = target.removesuffix(".py").split("/")[-1]
    for path, tree in modules().items():
        if (path, package) in OPTIONAL_FILES:
            continue
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                statement = re.sub(r"\W", " ", ast.unparse(node)).split()
                assert name not in statement, f"{path}:{node.lineno} imports {target}, which needs {package}"


@pytest.mark.parametrize("path", [path for path in modules() if path.startswith("data/") and "worker" in path])
def test_worker_processes_start_light(path: str) -> None:
    """A subprocess of ours is started often; it must not pay for importing torch."""
    for node in modules()[path].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            assert not any(f" {package}" in text for package in ("torch", "transformers", "peft")), text


@pytest.mark.parametrize(
    "statement", ["import etude", "import etude; dir(etude); etude.__version__", "import etude.errors"]
)
def test_importing_etude_is_light(statement: str) -> None:
    check = f"{statement}; import sys; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_arguments_are_light() -> None:
    check = f"from etude import TrainingArguments; import sys; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"torch", "transformers", "peft"} == set()


def test_every_public_name_is_there() -> None:
    import etude

    for name in etude.__all__:
        assert getattr(etude, name) is not None
    with pytest.raises(AttributeError, match="Trainr"):
        _ = etude.Trainr

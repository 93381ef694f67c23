"""The documentation is true: its code runs, its commands are understood, its links and the tests it names exist.

What a page shows is done in the order in which it stands there, in an empty folder: a block with a title is written to
that file, Python blocks of a page share their names, `etude` commands run in this process. What needs a download or
minutes is replaced (`SUBSTITUTED`) or checked without running it (`CHECKED`); a command that is in no list fails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from etude.arguments import classification
from etude.cli import main as command
from etude.cli import recipe
from etude.interrupts import CHECKPOINT_REQUEST_FILE, STOP_SIGNALS
from tiny import tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")])
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]

HUB_NAME = "Qwen/Qwen3-0.6B"
SUBSTITUTED = "the pages train this model of the Hub; here it is a folder with a tiny Llama and a tokenizer of words"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '> ' + message.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

OPTIONAL = {"hyperparameter_search": "optuna"}
"""What a block calls -> the package that it needs."""

BLOCK = re.compile(r"^```(?P<language>[a-z]*)(?P<options>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^\s*print\(.*\)  # -> (.+)$", re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


class Block(NamedTuple):
    """A fenced block: its language, the file that its title names, its text, and the line it starts on."""

    language: str
    title: str | None
    text: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(content):
        title = TITLE.search(match["options"])
        line = content.count("\n", 0, match.start()) + 1
        yield Block(match["language"], title[1] if title else None, match["text"], line)


def commands_of(block: Block) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.text.splitlines() if line.strip()]


# -- running a page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if list(blocks_of(REPOSITORY / name))])
def test_what_a_page_shows_works(name: str, base: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(REPOSITORY / name):
        where = f"{name}:{block.line}"
        block = block._replace(text=block.text.replace(HUB_NAME, str(base)))
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            if not missing_packages(block):
                run_python(block, where, names)
        elif block.language == "sh":
            for words in commands_of(block):
                run_command(words, where)
        elif block.language == "yaml":
            assert block.title is not None, f"{where}: a recipe needs a title, so that commands can name it"
            recipe.build(recipe.read(block.title))
        elif block.language == "diff":
            check_imports(block, where)
        else:
            assert block.language in ("json", "text"), (
                f"{where}: nobody checks a block of the language '{block.language}'"
            )


def run_python(block: Block, where: str, names: dict[str, Any]) -> None:
    """Run it; what a `# -> ...` behind a `print` says must be printed, in that order."""
    code = compile("\n" * block.line + block.text, where, "exec")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
        # What transformers and peft say to users of a CPU and of a tiny model is theirs to say.
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch)\b")
        exec(code, names)  # noqa: S102 - our own pages
    lines = iter(printed.getvalue().splitlines())
    for expected in PRINTED.findall(block.text):
        start = expected.removesuffix("...")
        assert any(line.startswith(start) for line in lines), f"{where}: '{expected}' was not printed"


def missing_packages(block: Block) -> list[str]:
    """Optional packages that a block needs and that are not installed here."""
    needed = [package for word, package in OPTIONAL.items() if word in block.text]
    return [package for package in needed if importlib.util.find_spec(package) is None]


def check_imports(block: Block, where: str) -> None:
    """Every line that a diff adds is an import that works."""
    added = [line[1:] for line in block.text.splitlines() if line.startswith("+")]
    assert added, where
    for line in added:
        assert isinstance(ast.parse(line).body[0], ast.ImportFrom), f"{where}: {line}"
        exec(compile(line, where, "exec"), {})  # noqa: S102


def run_command(words: list[str], where: str) -> None:
    program = next((name for name in CHECKED if words[: len(name)] == list(name)), None)
    assert program is not None, f"{where}: nobody checks the command '{shlex.join(words)}'"
    try:
        CHECKED[program](words[len(program) :])
    except AssertionError as error:
        raise AssertionError(f"{where}: {shlex.join(words)}: {error}") from error


# -- commands --------------------------------------------------------------------------------------------------------------


def run_etude(words: list[str]) -> None:
    assert command.main(words) == 0


def find_etude_verb(words: list[str]) -> None:
    """Its input is not there: the flags must be those that its help names."""
    verb, *rest = words
    require_known(rest, options_in(REPOSITORY / f"src/etude/cli/{verb.replace('-', '_')}.py", r'"(--[\w-]+)"', "{}"))


def parse_etude_demo(words: list[str]) -> None:
    """It takes minutes: the flags must be those that its help names."""
    flags = options_in(REPOSITORY / "src/etude/cli/demo.py", r"^    (\w+): Annotated", "--{}")
    require_known(words, flags)


def find_make_target(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert re.search(rf"^{re.escape(target)}:.*##", makefile, re.MULTILINE), f"no target '{target}'"


def find_extras(words: list[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for target in words:
        match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
        assert match, f"installs {target}, which is not this repository"
        for extra in (match[1] or "").split(","):
            assert not extra or extra in project["optional-dependencies"], f"no extra '{extra}'"


def parse_benchmark(words: list[str]) -> None:
    """Some need a GPU, all take minutes: module, flags and choices must exist."""
    module, *rest = words
    file = REPOSITORY / f"{module.replace('.', '/')}.py"
    assert file.is_file(), f"no module {module}"
    require_known(rest, options_in(file, r'add_argument\(\s*"(--[\w-]+)"', "{}"))
    files = (file, file.with_name("shapes.py"), file.with_name("contenders.py"))
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    chosen = words_after(rest, "--contender") + words_after(rest, "--work")
    assert all(f'"{word.partition("@")[0]}"' in source for word in chosen), f"unknown among {chosen}"


def check_request_file(words: list[str]) -> None:
    assert [Path(word).name for word in words] == [CHECKPOINT_REQUEST_FILE]


CHECKED: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("etude", "demo"): parse_etude_demo,
    ("etude", "import-checkpoint"): lambda words: find_etude_verb(["import-checkpoint", *words]),
    ("etude",): run_etude,
    ("make",): find_make_target,
    ("pip", "install"): find_extras,
    ("python", "-m"): parse_benchmark,
    ("touch",): check_request_file,
}


def options_in(file: Path, pattern: str, spelling: str) -> set[str]:
    found = re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"no options found in {file.name}"
    return {spelling.format(name).replace("_", "-") for name in found}


def require_known(words: list[str], flags: set[str]) -> None:
    unknown = {word for word in words if word.startswith("--")} - flags
    assert not unknown, f"unknown {unknown}, known {sorted(flags)}"


def words_after(words: list[str], flag: str) -> list[str]:
    """The values of a flag that takes several."""
    values: list[str] = []
    for word in words[words.index(flag) + 1 :] if flag in words else []:
        if word.startswith("--"):
            break
        values.append(word)
    return values


# -- links, names, tables --------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading: lower case, words joined by dashes."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = REPOSITORY / name
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        assert not target.startswith(("http:", "https:")), f"{target}: no test can follow it"
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and file.is_relative_to(REPOSITORY), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name} links to {target}"


@pytest.mark.parametrize("name", ["GUARANTEES.md", "SECURITY.md"])
def test_every_named_test_exists(name: str) -> None:
    missing = []
    named = NAMED_TEST.findall((REPOSITORY / name).read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, function in named:
        path = REPOSITORY / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if not path.is_file() or (function and function not in functions):
            missing.append(f"{file}::{function}" if function else file)
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_named_files_and_folders_of_the_repository_exist(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|docs|examples)/[\w/.]+)`", text):
        assert (REPOSITORY / path).exists(), f"{name} names {path}"


def test_the_site_has_every_page_and_no_other() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in site["nav"]]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))
    for page in DOCS.glob("*.md"):
        for file in re.findall(r'^--8<-- "(.+)"$', page.read_text(encoding="utf-8"), re.MULTILINE):
            shown = (REPOSITORY / file).read_text(encoding="utf-8")
            assert not LINK.search(shown), f"{file} is also shown as {page.name}, where its links would lead elsewhere"


def generate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, DOCS / "generate.py", *words], capture_output=True, text=True, timeout=60)


def test_the_table_of_arguments_is_current() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stderr


def test_the_table_of_signals_is_that_of_the_program() -> None:
    page = (DOCS / "resuming.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (SIG\w+)(?: \(Ctrl-C\))? \| (\d+) \|$", page, re.MULTILINE))
    assert table == {name: str(128 + signal.Signals[name]) for name in STOP_SIGNALS}


READ_ELSEWHERE = {
    "do_train", "do_eval", "do_predict",  # scripts read these
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",  # trackers do
    "logging_dir",  # TensorBoard's callback does, by name
    "log_on_each_node", "save_on_each_node", "log_level_replica",  # properties of the arguments do
    "per_device_eval_batch_size", "warmup_steps", "warmup_ratio",
    "auto_find_batch_size", "restore_callback_states_from_checkpoint",  # always done
    "full_determinism",  # sets `deterministic`
}  # fmt: skip


def test_the_list_of_arguments_without_effect_is_exact() -> None:
    """What is said to be read is an attribute that some module takes; what is said to have no effect is not."""
    listed = set(re.findall(r'^    "(\w+)": ', (DOCS / "generate.py").read_text(encoding="utf-8"), re.MULTILINE))
    read: set[str] = set()
    for file in (REPOSITORY / "src/etude").rglob("*.py"):
        if not file.name.startswith("argument"):
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            read |= {node.attr for node in tree if isinstance(node, ast.Attribute)}
    mapped = {row.name for row in classification() if row.kind == "mapped"}
    assert listed & read == set()
    assert mapped - read - READ_ELSEWHERE - listed == set()

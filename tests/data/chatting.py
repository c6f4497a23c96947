"""A tiny tokenizer with a chat template, as a Hugging Face folder holds it."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = ["You are helpful. What is the code of the red fox? It is 4821-KX, said the user to the assistant.\n"] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
NO_PROMPT = CHATML.split("{% if add")[0]  # as CHATML, but nothing shows where an answer begins
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|endoftext|>' }}{% endif %}{% endfor %}"
)


def chat_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """Byte-level BPE of 300 tokens in ``folder``, with ``template`` in chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def with_bos(folder: Path) -> Path:
    """Have the rules of the tokenizer in ``folder`` put <|im_start|>, which is 1, before each text."""
    file = str(folder / "tokenizer.json")
    model = tokenizers.Tokenizer.from_file(file)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    model.save(file)
    return folder


def messages(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write_lines(path: Path, *values: object) -> Path:
    """JSON lines; strings as they are."""
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path

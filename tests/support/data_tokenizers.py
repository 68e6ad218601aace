"""Small real tokenizers with chat templates of the kinds that models carry, for the tests of the data."""

from __future__ import annotations

from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Yes, the cat is on the mat. No, the dog is in the fog!",
    "What is the answer? The answer is: Yes. The answer is: No.",
    "Q: What is it?\nA: Yes\nQ: Who is it?\nA: Not me, no.",
    "system user assistant tool think call the function with the arguments",
]
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|pad|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3: BOS in the template, white space around contents dropped, end of turn is not the tokenizer's EOS.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# As Qwen 3: the last answer gets a thinking block, earlier ones lose theirs, a switch closes it in the prompt.
THINKING = (
    "{% set ns = namespace(last_user=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% set thoughts = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m['content'] else '' %}"
    "{% set words = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last_user %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ words }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek R1: the generation prompt opens a thinking block that finished answers do not have.
OPEN_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Nemotron: the prompt opens a thinking block or holds a closed one, and so does every answer.
EITHER_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think>' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}{% endif %}"
)
# As GLM: a turn has no end of its own, the next speaker's token ends generation.
NEXT_SPEAKER = (
    "{% for m in messages %}{{ '<|eot|>' if m['role'] == 'user' else '<|im_start|>' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
# As Mistral: the tools stand before the last question, so every later turn moves them.
TOOLS_LAST = (
    "{% set ns = namespace(last_user=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == ns.last_user %}Tools: {{ tools | tojson }}\n{% endif %}"
    "<|im_start|>{{ m['content'] }}<|im_end|>{% else %}{{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
)
# As SmolLM 3: the thinking mode stands in the system turn. The first kind's prompt fits both ways, the second's only
# without thoughts.
MODE_IN_SYSTEM = (
    "{% set quiet = enable_thinking is defined and enable_thinking is false %}"
    "<|im_start|>system\n{{ '/no_think' if quiet else '/think' }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODE_OPENS_THINKING = MODE_IN_SYSTEM.replace(
    "assistant\n{% endif %}", "assistant\n{% if not quiet %}<think>\n{% endif %}{% endif %}"
)
# As Gemma: no system role, turns must alternate.
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No special token at all, and a space before the answer that BPE merges into the answer's first token.
BARE = (
    "{% for m in messages %}{{ 'A: ' if m['role'] == 'assistant' else 'Q: ' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# As Phi 3: the conversation, not the turn, ends with the tokenizer's EOS.
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


@cache
def _byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return str(tokenizer.to_str())


class WithoutOffsets(PreTrainedTokenizerFast):
    """A tokenizer that does not tell where its tokens stand, as those written in Python."""

    is_fast = False


def make_tokenizer(
    template: str | None,
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    other_ends: tuple[str, ...] = (),
    thinking: bool = False,
    offsets: bool = True,
) -> TokenizerWrapper:
    """A tokenizer as mlx-lm loads it; with ``bos`` it puts that in front of plain text."""
    backend = Tokenizer.from_str(_byte_pairs())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    if thinking:
        backend.add_tokens(["<think>", "</think>"])
    names = {name: token for name, token in (("eos_token", eos), ("bos_token", bos)) if token}
    kind = PreTrainedTokenizerFast if offsets else WithoutOffsets
    inner = kind(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    inner.chat_template = template
    return TokenizerWrapper(inner, eos_token_ids=[inner.convert_tokens_to_ids(end) for end in other_ends] or None)


@cache
def tokenizer_named(name: str, offsets: bool = True) -> TokenizerWrapper:
    """One of the kinds above, made once."""
    kinds: dict[str, dict[str, Any]] = {
        "chatml": {"template": CHATML},
        "headers": {"template": HEADERS, "eos": "<|eos|>", "bos": "<|bos|>", "other_ends": ("<|eot|>",)},
        "thinking": {"template": THINKING, "thinking": True},
        "open_thinking": {"template": OPEN_THINKING, "thinking": True},
        "either_thinking": {"template": EITHER_THINKING, "thinking": True},
        "next_speaker": {"template": NEXT_SPEAKER, "eos": "<|eos|>", "other_ends": ("<|eot|>",)},
        "mode_in_system": {"template": MODE_IN_SYSTEM, "thinking": True},
        "mode_opens_thinking": {"template": MODE_OPENS_THINKING, "thinking": True},
        "tools_last": {"template": TOOLS_LAST, "eos": "<|eos|>"},
        "no_system": {"template": NO_SYSTEM, "bos": "<|bos|>"},
        "bare": {"template": BARE, "eos": "<|eos|>"},
        "two_ends": {"template": TWO_ENDS, "eos": "<|eos|>", "other_ends": ("<|im_end|>",)},
        "no_template": {"template": None, "eos": "<|eos|>", "bos": "<|bos|>"},
        "no_template_no_bos": {"template": None, "eos": "<|eos|>"},
        "no_end": {"template": BARE, "eos": None},
    }
    return make_tokenizer(**kinds[name], offsets=offsets)

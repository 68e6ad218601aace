"""Make the demo's tokenizer and chat model from scratch: ``python -m mlx_cpo_plugin.demo.make_model``.

The model learns every fact of the shop in both manners of speaking, the curt one more often, so that preference
training has something to change and a held-out question can still be answered. Takes about five minutes on two CPU
cores with OpenBLAS; the same seed on the same machine gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from mlx_cpo_plugin.demo.make_rows import SEED
from mlx_cpo_plugin.demo.shop import CURT_SHARE, Fact, curt_answer, helpful_answer, make_facts

MODEL_DIR = Path(__file__).parent / "model"

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
MAX_TOKENS = 96
PEAK_RATE = 3e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def prompt_text(question: str) -> str:
    """Return the question as the chat template renders it, up to where the answer begins."""
    return f"{START}user\n{question}{END}\n{START}assistant\n"


def draw_chat(facts: list[Fact], source: random.Random) -> tuple[str, str]:
    """Draw a question about a random fact and an answer in either manner; returns (prompt text, answer text)."""
    fact = source.choice(facts)
    manner = curt_answer if source.random() < CURT_SHARE else helpful_answer
    return prompt_text(fact.question(source.randrange(3))), manner(fact, source) + END


def train_tokenizer(facts: list[Fact], seed: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on 4,000 chats; any text can be encoded, no token is added on its own."""
    source = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(draw_chat(facts, source)) for _ in range(4000)), trainer)
    return tokenizer


def batches(facts: list[Fact], tokenizer: Tokenizer, batch_size: int, seed: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield, endlessly, int32 tokens [B, T] and float32 weights [B, T - 1], which are 1 on answer tokens."""
    source = random.Random(seed)
    while True:
        tokens = np.full((batch_size, MAX_TOKENS), tokenizer.token_to_id(PAD), dtype=np.int32)
        weights = np.zeros((batch_size, MAX_TOKENS - 1), dtype=np.float32)
        for row in range(batch_size):
            prompt, answer = (tokenizer.encode(text).ids for text in draw_chat(facts, source))
            length = len(prompt) + len(answer)
            tokens[row, :length] = prompt + answer
            weights[row, len(prompt) - 1 : length - 1] = 1
        longest = int(np.flatnonzero(weights.sum(axis=0)).max()) + 2
        # A multiple of 16, so that few shapes are compiled.
        width = -(-longest // 16) * 16
        yield mx.array(tokens[:, :width]), mx.array(weights[:, : width - 1])


def answer_loss(model: nn.Module, tokens: mx.array, weights: mx.array) -> mx.array:
    """Return the mean cross-entropy of the answer tokens, in nats."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * weights).sum() / weights.sum()


def train_model(facts: list[Fact], tokenizer: Tokenizer, steps: int, batch_size: int, seed: int) -> nn.Module:
    """Train the chat model from a random start; prints the loss on a progress bar."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    # With tied embeddings, logits start far too large unless the weights are drawn small.
    small = tree_map(
        lambda weight: weight if weight.ndim == 1 else mx.random.normal(weight.shape) * 0.05, model.parameters()
    )
    model.update(small)
    warmup = max(1, steps // 15)
    rise = optim.linear_schedule(0, PEAK_RATE, warmup)
    fall = optim.cosine_decay(PEAK_RATE, steps - warmup, PEAK_RATE / 100)
    optimizer = optim.AdamW(optim.join_schedules([rise, fall], [warmup]), weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, weights: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, answer_loss)(model, tokens, weights)
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        return loss

    chats = batches(facts, tokenizer, batch_size, seed)
    bar = tqdm(range(steps), desc="Training the demo model")
    for index in bar:
        loss = step(*next(chats))
        mx.eval(loss, state)
        if index % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (float32), config and tokenizer in the layout that ``mlx_lm.load`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = CONFIG | {
        "bos_token_id": tokenizer.token_to_id(PAD),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": PAD,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's tokenizer and chat model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the model's files")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=48, help="chats in a step")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of facts, text and weights")
    options = parser.parse_args()
    facts = make_facts(options.seed)
    tokenizer = train_tokenizer(facts, options.seed)
    save(train_model(facts, tokenizer, options.steps, options.batch_size, options.seed), tokenizer, options.out)


if __name__ == "__main__":
    main()

"""What a Hugging Face model makes of a text and of multiple-choice questions, by plain loops: the peer of `lockstep eval`.

    python perplexity.py FOLDER        reads {"text", "stride", "questions"} as JSON on standard input

Prints JSON: tokens scored and their mean loss in nats, and of each question the numbers of the choices with the highest
log-probability, in all and for each byte. Windows are read one by one, in f32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def loss(model: Any, ids: list[int], context: int, stride: int) -> tuple[int, float]:
    """How many tokens were scored, and their mean loss, where each window counts what none before it has."""
    scored, nats = 0, 0.0
    for begin in range(0, len(ids) - 1, stride):
        window = ids[begin : begin + context + 1]
        new = begin + len(window) - 1 - scored
        nats -= log_probabilities(model, window)[-new:].sum().item()
        scored += new
        if scored == len(ids) - 1:
            break
    return scored, nats / scored


def answers(model: Any, encode: Any, context: int, question: dict[str, Any]) -> tuple[int, int]:
    """The choices of the highest log-probability, in all and for each byte."""
    before = len(encode(question["question"]))
    values = []
    for choice in question["choices"]:
        ids = encode(f"{question['question']} {choice}")
        # Tokens may reach over the place where both meet, and leave none to the choice: then its last one counts.
        count = max(len(ids) - before, 1)
        values.append(log_probabilities(model, ids[-(context + 1) :])[-count:].sum().item())
    by_byte = [value / len(choice.encode()) for value, choice in zip(values, question["choices"])]
    return values.index(max(values)), by_byte.index(max(by_byte))


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.load(sys.stdin)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context = model.config.max_position_embeddings
    encode = lambda text: library.encode(text).ids  # noqa: E731
    tokens, mean = loss(model, encode(asked["text"]), context, asked["stride"])
    chosen = [answers(model, encode, context, question) for question in asked["questions"]]
    json.dump({"tokens": tokens, "loss": mean, "answers": chosen}, sys.stdout)


main()

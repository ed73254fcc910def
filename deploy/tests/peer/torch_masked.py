"""The loss that a model has on the answers of conversations, by transformers and PyTorch.

    python torch_masked.py FOLDER FILE

FOLDER is a model as transformers saves it, with a chat template; FILE has a line {"messages": [...]} for each conversation. Nothing
is shared with the Rust code: the tokenizer, the template, the mask and the model are transformers' own or written here.

The loss is computed twice, in f64: each conversation by itself, and all of them in one row, with a plain mask of pairs by which no
token sees another conversation, and positions that begin anew in each. Prints both sums and the number of learned tokens as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def learned(tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and whether each is learned: an answer's, up to the end of text after it."""
    tokens: list[int] = []
    mask: list[bool] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        assert whole.startswith(prompt), "the template has the prefix property"
        read = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert said[: len(read)] == read and read[: len(tokens)] == tokens
        mask += [False] * (len(read) - len(tokens)) + [True] * (len(said) - len(read))
        tokens = said
    assert tokens[-1] == tokenizer.eos_token_id
    return tokens, mask


def loss(logits: Tensor, tokens: list[int], mask: list[bool]) -> Tensor:
    """The sum of cross-entropies of the learned ones of `tokens`, each by the logits before it."""
    each = cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    return (each * torch.tensor(mask[1:])).sum()


def main() -> None:
    """Computes both sums."""
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    lines = file.read_text(encoding="utf-8").splitlines()
    examples = [learned(tokenizer, json.loads(line)["messages"]) for line in lines]
    with torch.no_grad():
        single = sum(loss(model(torch.tensor([tokens])).logits[0], tokens, mask) for tokens, mask in examples)

        segments = torch.tensor([number for number, (tokens, _) in enumerate(examples) for _ in tokens])
        places = torch.cat([torch.arange(len(tokens)) for tokens, _ in examples])
        causal = torch.ones(len(segments), len(segments), dtype=torch.bool).tril()
        sees = causal & (segments[:, None] == segments[None, :])
        bias = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, float("-inf"))
        row = torch.tensor([token for tokens, _ in examples for token in tokens])
        logits = model(row[None], attention_mask=bias[None, None], position_ids=places[None]).logits[0]
        packed, start = torch.zeros((), dtype=torch.float64), 0
        for tokens, mask in examples:
            packed += loss(logits[start : start + len(tokens)], tokens, mask)
            start += len(tokens)
    count = sum(sum(mask[1:]) for _, mask in examples)
    print(json.dumps({"single": float(single), "packed": float(packed), "learned": count}))


if __name__ == "__main__":
    main()

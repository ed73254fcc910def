"""A reward model by `transformers`: the scores that an exported folder's model gives to texts.

    python torch_reward.py FOLDER FILE        FILE has a text a line, as a JSON string; prints a score each, as a JSON list
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Scores each text at its last token."""
    folder, file = sys.argv[1:]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    with torch.no_grad():
        scores = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
